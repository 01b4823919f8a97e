"""glmlab takes a chat model apart and shows where its GPU memory goes."""
