"""Checkpoints made smaller, and what is refused."""
