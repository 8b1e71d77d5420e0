"""Guidance inside other people's pipelines."""
