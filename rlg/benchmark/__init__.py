"""Cost of guidance and training, measured side by side."""
