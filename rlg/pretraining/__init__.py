"""Pretraining of the tinyworld's base models."""
