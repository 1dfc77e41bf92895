"""Soft prompts: trained vectors before a sample, in the place of embeddings or keys and values.

Virtual tokens are ordinary tokens of a row, whose ids follow the vocabulary's. So positions, masks,
packing, caches and shardings know nothing of them. At its doors (`VirtualTokens`) the model takes
for them what the leaves there hold.
"""
