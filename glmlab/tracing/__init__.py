"""What a run of a model asks of the allocator, traced without a GPU."""
