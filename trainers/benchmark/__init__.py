"""Cost of a training iteration, by phase."""
