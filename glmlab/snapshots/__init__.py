"""Memory histories that PyTorch recorded on real GPUs: read safely, replayed."""
