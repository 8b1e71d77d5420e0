"""Evaluation: guided images, scored, as rows and paired statistics."""
