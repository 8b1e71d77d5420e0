"""Model cards, the hub and W&B: all that leaves this machine."""
