"""Checkpoints of a run: written whole or not at all, identified by what made them, and resumed."""
