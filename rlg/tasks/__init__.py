"""Prompt sets: from files, from datasets, from the tinyworld."""
