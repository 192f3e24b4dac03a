"""What machine this is, and how much of its memory this process may use.

Schedulers such as Slurm confine a job with a control group, so the smallest of all the limits is
what counts: /proc/meminfo alone would promise a job the memory of the whole node.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from octavo import _native
from octavo.errors import OctavoError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
SYSTEM = Path("/sys/devices/system/cpu")
# Places of cuBLASLt and NCCL in pip's folder "nvidia" (torch brings both), the best first.
_PACKAGED = (
    ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.1?"),
    ("nccl/lib/libnccl.so.2",),
)


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP, *, reserved: int = 0) -> int:
    """Bytes this process can still take without swapping or being killed.

    Linux: MemAvailable, lowered by control-group limits (v1 and v2, of every group above this
    process) and by `ulimit -v`. Elsewhere: half of the physical memory. The native core reads
    the folders, as it does for the number of threads; others than the real ones are for tests.
    reserved: bytes that it has mapped and not touched yet; `ulimit -v` counts them as taken.
    """
    return _native.available_memory(str(proc), str(cgroup), reserved)


def total_memory(proc: Path = PROC) -> int:
    """Bytes of physical memory in this machine, whatever the limits on this process."""
    total = _sizes(proc / "meminfo").get("MemTotal")
    if total is not None:
        return total
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError) as error:
        raise OctavoError(f"this system does not say how much memory it has: {error}") from error


def usable_cores(most: int = 8) -> int:
    """How many threads convert weights at a time; more than `most` would wait for memory."""
    return min(_native.physical_cores(), most)


def core_share(cores: Collection[int], part: int, parts: int, system: Path = SYSTEM) -> set[int]:
    """A part of some processors, for one of several processes that compute side by side.

    The threads of a core stay together, and so do the cores of a socket, whose memory is near.
    system: the folder that tells which are which. With fewer cores than parts, parts share them.
    """

    def topology(core: int) -> tuple[str, str]:
        folder = system / f"cpu{core}" / "topology"
        try:
            socket = (folder / "physical_package_id").read_text().strip()
            return socket.zfill(4), (folder / "thread_siblings_list").read_text().strip()
        except OSError:
            return "", str(core)

    places: dict[tuple[str, str], list[int]] = {}
    for core in sorted(cores):
        places.setdefault(topology(core), []).append(core)
    groups = [places[place] for place in sorted(places, key=lambda p: (p[0], places[p]))]
    if len(groups) < parts:
        return set(groups[part % len(groups)])
    first, last = (len(groups) * edge // parts for edge in (part, part + 1))
    return {core for group in groups[first:last] for core in group}


def threads_of_rank(num_threads: int, ranks: int) -> int:
    """How many CPU threads each of a model's ranks has.

    num_threads: those that were asked for; 0: the rank's share of the cores, or of a control
    group's quota, which all ranks have together. One at least.
    """
    return num_threads or max(1, _native.physical_cores() // ranks)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count /= 1024
        power += 1
    return f"{count:.{min(power, 1)}f} {units[power]}"


@dataclass(frozen=True)
class Resident:
    """Memory of this process that lies in RAM, mapped files included, in bytes."""

    now: int
    peak: int  # since the process began


def resident_memory(proc: Path = PROC) -> Resident | None:
    """What this process takes; None where the system does not tell (Linux does)."""
    sizes = _sizes(proc / "self" / "status")
    known = "VmRSS" in sizes and "VmHWM" in sizes
    return Resident(sizes["VmRSS"], sizes["VmHWM"]) if known else None


def anonymous_memory(proc: Path = PROC) -> int | None:
    """Bytes of this process in RAM that no file holds; None where the system does not tell."""
    return _sizes(proc / "self" / "status").get("RssAnon")


def _sizes(path: Path) -> dict[str, int]:
    """Lines such as "MemFree:  12 kB", in bytes."""
    sizes = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            sizes[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return sizes


def _read(path: Path) -> str:
    """The text of a system file; "" where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor() -> str:
    """The processor's name as the system gives it."""
    for line in _read(PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def open_packaged_libraries(ranks: int = 1) -> None:
    """Open cuBLASLt, for several ranks NCCL too, where pip has put them, if they are there.

    The dynamic linker knows the system's folders, not pip's. Once a library is open, the native
    core finds it by its bare name.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (spec.submodule_search_locations or ())] if spec else []
    for patterns in _PACKAGED if ranks > 1 else _PACKAGED[:1]:
        found = (path for each in patterns for folder in folders for path in folder.glob(each))
        for path in found:
            with contextlib.suppress(OSError):  # of another platform, say: octavo does without
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                break
