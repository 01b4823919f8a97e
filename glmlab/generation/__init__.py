"""What the model does: prompts, the decode loop, the chat."""
