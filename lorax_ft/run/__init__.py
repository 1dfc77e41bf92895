"""A run as a person meets it: setting up, the loop, progress, reports, logs, checkpoints, the output folder."""
