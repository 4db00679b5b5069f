"""Forward passes through families: hidden states, shared prefixes, KL from the teacher."""
