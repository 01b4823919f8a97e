"""PyTorch's caching allocator, modelled: its rules, and a fast replay of allocation programs."""
