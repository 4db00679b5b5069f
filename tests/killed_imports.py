"""Imports what the command lines of `tests/killed.py` need, once for all of its processes."""

import conftest  # noqa: F401  first, it sets the environment

import train.run
import train.train  # noqa: F401
