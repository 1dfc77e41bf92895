"""Generation with a cache, and the tuned model that a run left behind."""
