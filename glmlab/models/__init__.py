"""Where a model comes from: checkpoints, ChatGLM3 in transformers, loading."""
