"""Rows from files or the hub, conversations, loss masks, packing, batches. numpy only: no JAX."""
