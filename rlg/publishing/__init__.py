"""Model cards, the hub and W&B: everything that leaves this machine."""
