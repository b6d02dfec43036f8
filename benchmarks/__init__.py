"""Side-by-side ratios against peers, one script per claim. Run from the repository's root."""
