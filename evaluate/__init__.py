"""Measure every size of a family with lm-evaluation-harness.

Hugging Face also has a package called `evaluate`, and lm-eval's tasks import it. Both share this
name: what this folder does not define comes from the installed package. Importing that takes
seconds, so its `__init__` runs in this namespace only when something first asks for one of its
names or submodules.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType


def _run_installed() -> bool:
    """Run the installed package's `__init__` here. Return False if it has run before, or if the
    package is not installed.
    """
    if len(__path__) > 1:
        return False
    try:
        # Not a search of the path: that also finds other clones of this toolkit.
        folder = Path(str(distribution(__name__).locate_file(__name__)))
    except PackageNotFoundError:
        return False
    __path__.append(str(folder))
    init = folder / "__init__.py"
    exec(compile(init.read_text(encoding="utf-8"), str(init), "exec"), globals())
    return True


def __getattr__(name: str):
    is_asked_of_any_module = name.startswith("__") and name != "__version__"
    if not is_asked_of_any_module and _run_installed() and name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _InstalledSubmodules(MetaPathFinder, Loader):
    """Runs the installed `__init__` before the first import of an installed submodule."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname.rpartition(".")[0] != __name__ or not _run_installed():
            return None
        if fullname not in sys.modules:
            return PathFinder.find_spec(fullname, __path__)
        # The installed `__init__` has imported it, and the import system would run it again.
        spec = sys.modules[fullname].__spec__
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_InstalledSubmodules())  # asked for what this folder does not have
