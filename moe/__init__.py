"""What an expert is, where it lives, and how tokens reach it."""
