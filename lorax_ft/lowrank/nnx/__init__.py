"""Models of flax.nnx, as functions of their parameters."""
