"""Folders of runs: sweeps, and the state of everything that runs."""
