"""Foreign checkpoints to this project's parameter trees. PyTorch is imported only here, and only inside functions."""
