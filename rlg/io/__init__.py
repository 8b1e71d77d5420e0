"""Files: parsed strictly, written whole, locked while a process writes them."""
