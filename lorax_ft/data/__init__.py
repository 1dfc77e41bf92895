"""Datasets: reading, chat templates, loss masks, packing and batching. NumPy only, no JAX."""
