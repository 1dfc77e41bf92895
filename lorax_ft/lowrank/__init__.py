"""The heart: low-rank leaves in a parameter tree, and the one forward that reads them."""
