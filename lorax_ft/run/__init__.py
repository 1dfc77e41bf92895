"""Training runs: setup, loop, progress, reports, log, checkpoints and the output folder."""
