"""Plans of a run on hardware that is not here: what fits, and how fast it could be."""
