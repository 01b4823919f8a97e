"""Memory of a model at every context length, computed without a GPU."""
