"""The folder that an example fills, and empties before it starts again. What the example did not
make is never removed.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from patching.files.json_files import has_type, read_object
from patching.files.outputs import check_new_folder, write_json


class Sign(NamedTuple):
    """What shows that an example of an earlier version made a folder: words in one of its files."""

    file_name: str
    words: str

    def is_in(self, folder: Path) -> bool:
        path = folder / self.file_name
        if folder.is_symlink() or not path.is_file():
            return False
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(self.words in line for line in file)


class OwnFolder:
    """A folder that is an example's own: it was new or empty, or its file `mark` says what the
    example made there.

    Folders of earlier versions have no mark. They hold the folders named in `needed`, and every
    folder named in `signs` that is there has its sign. Raises ValueError for any other folder.
    """

    def __init__(
        self, folder: Path, mark: str, signs: Mapping[str, Sign], needed: Sequence[str]
    ) -> None:
        self._folder, self._mark = folder, folder / mark
        # The files under each name that was made, None for one that was not finished.
        self._made: dict[str, list[str] | None] = {}
        there = [name for name in signs if _exists(folder / name)]
        if self._mark.is_file():
            values = read_object(self._mark)
            if not has_type(values.get("made"), dict[str, list[str] | None]):
                raise ValueError(
                    f"{self._mark} is not of this example: name another --save_directory"
                )
            self._made = values["made"]
        elif set(needed) <= set(there) and all(signs[name].is_in(folder / name) for name in there):
            self._made = dict.fromkeys(there)
        else:
            check_new_folder(folder)

    def mark(self) -> None:
        """Write the mark, so that the next run knows the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._mark, {"made": self._made})

    def remove(self, names: Iterable[str]) -> None:
        """Remove what was made under some names. Raises ValueError, and removes nothing, if there
        is anything else.
        """
        there = [name for name in names if _exists(self._folder / name)]
        for name in there:
            if (other := self._not_made(name)) is not None:
                raise ValueError(
                    f"{other} was not made here by this example: move it, or name another "
                    "--save_directory"
                )
        for name in there:
            shutil.rmtree(self._folder / name)
            del self._made[name]
        self.mark()

    def _not_made(self, name: str) -> Path | None:
        """Return something under a name that the example did not make, None if there is none."""
        path = self._folder / name
        if name not in self._made or path.is_symlink() or not path.is_dir():
            return path
        made = self._made[name]
        others = set() if made is None else set(_files_in(path)) - set(made)
        return path / min(others) if others else None

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Yield the folder of that name while it is filled."""
        self._made[name] = None
        self.mark()
        yield self._folder / name
        self._made[name] = _files_in(self._folder / name)
        self.mark()


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _files_in(folder: Path) -> list[str]:
    """The files and links below a folder, relative to it."""
    paths = sorted(folder.rglob("*"))
    return [str(p.relative_to(folder)) for p in paths if p.is_symlink() or not p.is_dir()]
