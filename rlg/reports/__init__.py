"""Figures, tables and pages of evaluations and runs."""
