"""Plain linen decoders. They know nothing of adapters."""
