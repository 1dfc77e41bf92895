"""Sweeps: many adapters over one base, trained in one compiled program."""
