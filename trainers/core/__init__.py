"""Configuration, set-up and the loop that all trainers share."""
