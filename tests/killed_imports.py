"""Imports all that a command line may need, once for all processes of `tests/killed.py`."""

from contextlib import suppress
from importlib import import_module
from pkgutil import walk_packages

import conftest  # noqa: F401  first, it sets the environment
import datasets  # noqa: F401
import lm_eval.tasks  # noqa: F401
import matplotlib.pyplot  # noqa: F401

import evaluate
import patching
import train

for package in (patching, evaluate, train):
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        with suppress(ImportError):  # what needs a library that is not there
            import_module(module.name)
