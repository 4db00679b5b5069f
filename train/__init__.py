"""Distil a depth-pruned student from its teacher."""
