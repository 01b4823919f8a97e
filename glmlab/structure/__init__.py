"""What a model is made of: its classes, live or from source that is never run, and its module tree."""
