"""Checkpoints on disk: their layout, their sizes, and writing new ones."""
