"""Noise processes and one sampling loop, for any model family."""
