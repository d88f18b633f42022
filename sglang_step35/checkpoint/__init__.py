"""How checkpoints are stored: one reader a format, names and shapes of tensors."""
