"""What a prompt becomes: roles, segments, token ids."""
