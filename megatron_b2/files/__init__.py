"""Files of every kind: written whole or not at all, hashed, with progress."""
