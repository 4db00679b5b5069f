"""Measure every size of a family with lm-evaluation-harness.

Hugging Face has a package of this name too, and lm-eval's tasks import it. Both live here: what
this folder does not define comes from the installed package, whose own `__init__` runs in this
namespace the first time anything of it is asked for (it takes seconds to import)."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pkgutil import extend_path
from types import ModuleType

_own_folder = __path__[0]
_installed_folders = [path for path in extend_path(__path__, __name__) if path != _own_folder]
_installed_has_run = False


def _run_installed() -> None:
    """Run the installed package's `__init__` here, once; nothing where it is not installed."""
    global _installed_has_run
    if _installed_has_run or not _installed_folders:
        return
    _installed_has_run = True
    __path__.extend(_installed_folders)
    init = Path(_installed_folders[0], "__init__.py")
    exec(compile(init.read_text(encoding="utf-8"), str(init), "exec"), globals())


def __getattr__(name: str):
    if not _installed_has_run and (not name.startswith("__") or name == "__version__"):
        _run_installed()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _InstalledSubmodules(MetaPathFinder):
    """`import evaluate.loading` as the first use: the installed `__init__` has to run before its
    submodules.
    """

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if _installed_has_run or fullname.rpartition(".")[0] != __name__:
            return None
        if PathFinder.find_spec(fullname, [_own_folder]) or not PathFinder.find_spec(
            fullname, _installed_folders
        ):
            return None
        _run_installed()
        module = sys.modules.get(fullname)
        if module is not None:
            # The import system takes the spec of a module that is there already, and would run it
            # again.
            origin, locations = module.__spec__.origin, module.__spec__.submodule_search_locations
            module.__spec__ = ModuleSpec(fullname, _Loaded(module), origin=origin)
            module.__spec__.submodule_search_locations = locations
        return getattr(module, "__spec__", None)


class _Loaded(Loader):
    """Gives a module that `_run_installed` has imported already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, _InstalledSubmodules())
