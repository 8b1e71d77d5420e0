"""Checkpoints: written whole, found again, resumed."""
