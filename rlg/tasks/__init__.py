"""Prompt sets from files, from datasets and from the tinyworld."""
