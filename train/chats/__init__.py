"""Training on chats: their flags, which tokens are responses, rows, and the phases of a run."""
