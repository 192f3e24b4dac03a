"""Files that a user names: what can go wrong with one, as a FileError of one sentence.

The sentence names the file, says what it is to be, and what to do.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from octavo.errors import FileError, InsufficientMemoryError, OctavoError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def read_text(path: str | Path, what: str) -> str:
    """A whole file in UTF-8. what: it, for the message, as in "an event log". Raises FileError."""
    with reading(path, what):
        return Path(path).read_bytes().decode("utf-8")


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn a failure to read `path`, or bytes in it that are no UTF-8, into a FileError."""
    try:
        yield
    except OctavoError:
        raise
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); expected {what}: convert "
            "it, as with `iconv -t UTF-8`"
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            problem = "does not exist"
        elif isinstance(error, IsADirectoryError):
            problem = "is a directory"
        else:
            problem = f"cannot be read ({error.strerror or error})"
        advice = ": ask its owner for it" if error.errno in _FORBIDDEN else ""
        raise FileError(f"{path} {problem}; expected {what}{advice}") from error


def check_is_no_pointer(path: object, begin: bytes, error: type[OctavoError]) -> None:
    """Raise `error` for a file that begins as what Git leaves in place of one without its LFS."""
    if begin == b"version ":
        raise error(
            f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder, or "
            "fetch the model with `octavo pull`"
        )


def map_file(path: Path) -> mmap.mmap:
    """A whole file, mapped to be read. OSError as of `open`, ValueError for an empty one.

    Raises InsufficientMemoryError where the shell's limit leaves too few addresses for it.
    """
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            size = os.fstat(file.fileno()).st_size
            raise InsufficientMemoryError(
                f"{path} cannot be mapped: its {size:,} bytes are more than the addresses that "
                "this process may still use",
                otherwise="raise the limit (`ulimit -v unlimited`), or use a smaller model",
            ) from error


@contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Turn a failure to write `path` into a FileError. what: it, as in "the event log"."""
    try:
        yield
    except OctavoError:
        raise
    except OSError as error:
        raise FileError(_not_written(Path(path), what, error)) from error


def write_text(path: str | Path, what: str, text: str) -> None:
    """Write a file in UTF-8, as `write_bytes`."""
    write_bytes(path, what, text.encode("utf-8"))


def write_bytes(path: str | Path, what: str, content: bytes) -> None:
    """Write a file, whole or not at all; a pipe or a device is written to as it is.

    what: it, as in "the trace". Raises FileError.
    """
    path = Path(path)
    check_writable(path, what)  # else a file that must not be changed would be replaced
    with writing(path, what):
        target = path.resolve()  # what a link leads to: the link itself stays
        in_place = path.exists() and not path.is_file()
        if in_place or not os.access(target.parent, os.W_OK):
            path.write_bytes(content)
            return
        temporary = target.with_name(f".octavo.{os.getpid()}.partial")
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def open_durably(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write bytes to; it is on the disk when the block ends. Raises OSError."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk. Raises OSError."""
    with open_durably(path) as file:
        file.write(content)


def check_writable(path: str | Path, what: str) -> None:
    """Raise before the work what `writing` would raise after it; makes and changes nothing."""
    path = Path(path)
    with writing(path, what):
        place = path if path.exists() else path.parent
        problems = {
            errno.EISDIR: path.is_dir(),
            errno.ENOENT: not place.exists(),
            errno.ENOTDIR: place == path.parent and not place.is_dir(),
            errno.EACCES: not os.access(place, os.W_OK),
        }
        for code, is_so in problems.items():
            if is_so:
                raise OSError(code, os.strerror(code))  # the subclass of that number


def expand_home(path: str | Path) -> Path:
    """A path with "~" replaced; as it is where that home directory is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no HOME and no entry in the password file
        return Path(path)


def _not_written(path: Path, what: str, error: OSError) -> str:
    start = f"{what} cannot be written to {path}"
    if error.errno in _FULL:
        return f"{start}: the disk is full; free some space, or name a file on another disk"
    if isinstance(error, IsADirectoryError):
        return f"{start}: it is a directory; expected the name of a file"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return f"{start}: {path.parent} is no directory; make it first, or name another"
    place = " in a directory of your own" if error.errno in _FORBIDDEN else ""
    return f"{start}: {error.strerror or error}; name another file{place}"
