"""Configs of other trainers: a table for each, from their keys to options of ours."""
