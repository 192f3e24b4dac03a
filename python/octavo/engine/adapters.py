"""Which LoRA adapters an engine has, and which of them are in the device's memory.

A name stands for a folder. At most `capacity` adapters are in memory, each in a place of its own; a
request takes its adapter's place for as long as it runs. If a request's adapter is not in memory it
is read again, into a free place, or into the one whose last request came longest ago; a place that
a request uses is never given away.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.engine.block_pool import IntegrityError
from octavo.errors import (
    AdapterNotFoundError,
    AdaptersInUseError,
    InsufficientMemoryError,
    InvalidArgumentError,
)

if TYPE_CHECKING:
    from octavo.models.adapter import Adapter


class Loan(NamedTuple):
    """A request's hold on an adapter.

    slot: its place; -1: no adapter. load: a number that no other load of any adapter has: keys and
    values are shared by requests with the same one. 0: no adapter.
    """

    slot: int = -1
    load: int = 0


NO_ADAPTER = Loan()


@dataclass
class _Entry:
    """A name. is_gone: it was removed while requests used it."""

    path: Path
    loan: Loan = NO_ADAPTER
    num_users: int = 0
    last_use: int = 0
    is_gone: bool = False


class AdapterTable:
    """The adapters of an engine. Not thread-safe, but `paths` may be read at any time.

    runtime: has `load_adapter` and `unload_adapter` of `_native.Runtime`. capacity: how many may be
    in memory. read: reads and checks a folder; None: this engine takes no adapters.
    """

    def __init__(self, runtime: Any, capacity: int, read: Callable[[Path], Adapter] | None) -> None:
        self.capacity = capacity
        self._runtime = runtime
        self._read = read
        self._entries: dict[str, _Entry] = {}
        self._places: dict[int, _Entry] = {}
        self._loads = itertools.count(1)
        self._uses = itertools.count(1)

    @property
    def paths(self) -> dict[str, Path]:
        """Every name and its folder."""
        return {name: entry.path for name, entry in list(self._entries.items())}

    def add(self, name: str, path: Path) -> None:
        """Read an adapter and name it.

        Raises InvalidArgumentError for a name that is empty or taken, AdaptersInUseError where
        no place can be emptied, and what reading raises. The table is then as before.
        """
        if not name or name in self._entries:
            state = "taken: remove that adapter first, or choose another" if name else "empty"
            raise InvalidArgumentError(f"the adapter's name {name!r} is {state}")
        if self._read is None or not self.capacity:
            raise InvalidArgumentError(
                f"the adapter {name!r} cannot be loaded: max_adapters is {self.capacity}, and a "
                "model has to be loaded from its files; expected 1 or more"
            )
        entry = _Entry(path)
        self._load(entry)
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget a name; requests that use it go on. AdapterNotFoundError for an unknown one."""
        entry = self._find(name)
        del self._entries[name]
        entry.is_gone = True
        if not entry.num_users and entry.loan != NO_ADAPTER:
            self._unload(entry)

    def acquire(self, name: str | None) -> Loan:
        """Take an adapter for a request; None: none. Give it back with `release`.

        Raises AdapterNotFoundError; AdaptersInUseError where requests use all places; and what
        reading raises, if it has to be read again.
        """
        if name is None:
            return NO_ADAPTER
        entry = self._find(name)
        if entry.loan == NO_ADAPTER:
            self._load(entry)
        entry.num_users += 1
        entry.last_use = next(self._uses)
        return entry.loan

    def release(self, loan: Loan) -> None:
        """Give back what `acquire` returned."""
        if loan == NO_ADAPTER:
            return
        entry = self._places[loan.slot]
        entry.num_users -= 1
        if entry.num_users < 0 or entry.loan != loan:
            raise IntegrityError(f"the adapter in place {loan.slot} was given back twice")
        if entry.is_gone and not entry.num_users:
            self._unload(entry)

    def _find(self, name: str) -> _Entry:
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise AdapterNotFoundError(name, tuple(self._entries))
        return entry

    def _load(self, entry: _Entry) -> None:
        if self._read is None:
            raise IntegrityError("an adapter without a reader")
        adapter = self._read(entry.path)
        slot = self._empty_place()
        try:
            self._runtime.load_adapter(slot, adapter.native())
        except MemoryError as error:
            problem = f"the adapter in {entry.path} could not be allocated"
            raise InsufficientMemoryError(problem, otherwise="unload others") from error
        entry.loan, entry.last_use = Loan(slot, next(self._loads)), next(self._uses)
        self._places[slot] = entry

    def _empty_place(self) -> int:
        """A free place, or the one that was used longest ago, emptied."""
        for slot in range(self.capacity):
            if slot not in self._places:
                return slot
        idle = [entry for entry in self._places.values() if not entry.num_users]
        if not idle:
            raise AdaptersInUseError(self.capacity)
        entry = min(idle, key=lambda each: each.last_use)
        slot = entry.loan.slot
        self._unload(entry)
        return slot

    def _unload(self, entry: _Entry) -> None:
        slot, entry.loan = entry.loan.slot, NO_ADAPTER
        del self._places[slot]
        self._runtime.unload_adapter(slot)
