"""Guidance rules: wrappers with the network's own signature."""
