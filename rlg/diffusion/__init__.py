"""Noise processes, and the sampling loop over them, for any model family."""
