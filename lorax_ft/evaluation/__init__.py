"""What a model can do, as numbers."""
