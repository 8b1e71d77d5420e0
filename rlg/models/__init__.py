"""Base models and tuned ones: loading, LoRA adapters, full networks."""
