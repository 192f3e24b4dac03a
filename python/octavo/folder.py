"""The small files of a model: those of a directory, or those that a GGUF file stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class MemoryFile:
    """A text that is made when it is asked for, read as the file of a directory is read."""

    def __init__(self, name: str, place: str, make: Callable[[], str] | None) -> None:
        """place: what to call it in a message. make None: there is no such file."""
        self.name = name
        self.stem = name.rsplit(".", 1)[0]
        self._place = place
        self._make = make

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return self._make is not None

    def read_text(self, encoding: str = "utf-8") -> str:
        """The text; FileNotFoundError where there is no such file."""
        if self._make is None:
            raise FileNotFoundError(2, "there is no such file", self._place)
        return self._make()

    def read_bytes(self) -> bytes:
        """The text as UTF-8."""
        return self.read_text().encode("utf-8")

    def glob(self, pattern: str) -> Iterator[MemoryFile]:
        """Nothing: a file that is made holds no other files."""
        return iter(())

    def __str__(self) -> str:
        return self._place


class MemoryFolder:
    """Files that are made when they are asked for, read like those of a directory."""

    def __init__(
        self,
        path: Path,
        files: Mapping[str, Callable[[], str]],
        make_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        """path: the file that stands for them all.

        make_tokenizer: makes the `tokenizers.Tokenizer` of tokenizer.json, without the time that
        writing and reading such a text takes.
        """
        self.path = path
        self.make_tokenizer = make_tokenizer
        self._files = dict(files)

    def __truediv__(self, name: str) -> MemoryFile:
        return MemoryFile(name, f"{self.path} ({name})", self._files.get(name))

    def iterdir(self) -> Iterator[MemoryFile]:
        """All files there are."""
        return (self / name for name in self._files)

    def __str__(self) -> str:
        return str(self.path)


Folder = Path | MemoryFolder
FolderFile = Path | MemoryFile


def as_folder(path: Folder | str) -> Folder:
    """A directory's name or path as a path; what holds its files in memory as it is."""
    return path if isinstance(path, MemoryFolder) else Path(path)
