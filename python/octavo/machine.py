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
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import OctavoError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP, *, reserved: int = 0) -> int:
    """Bytes this process can still take without swapping or being killed.

    reserved: bytes among them that it has mapped and not touched yet, which `ulimit -v` counts.

    Linux: MemAvailable, lowered by control-group limits (v1 and v2, of every group above this
    process) and by `ulimit -v`. Elsewhere: the free pages the system reports; where it reports
    none (macOS), half of the physical memory. The folders are parameters for the tests.
    """
    machine = _meminfo(proc).get("MemAvailable")
    if machine is None:
        machine = _free_memory_by_sysconf()
    mapped = [room + reserved for room in _address_space_room(proc)]
    return max(0, min([machine, *_cgroup_room(proc, cgroup), *mapped]))


def total_memory(proc: Path = PROC) -> int:
    """Bytes of physical memory in this machine, whatever the limits on this process."""
    total = _meminfo(proc).get("MemTotal")
    return total if total is not None else _sysconf("SC_PHYS_PAGES") * _sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Resident:
    """Memory of this process that lies in RAM, mapped files included, in bytes."""

    now: int
    peak: int  # since the process began


def resident_memory(proc: Path = PROC) -> Resident | None:
    """What this process takes; None where the system does not tell (Linux does)."""
    sizes = _sizes(proc / "self" / "status")
    if "VmRSS" not in sizes or "VmHWM" not in sizes:
        return None
    return Resident(sizes["VmRSS"], sizes["VmHWM"])


def _meminfo(proc: Path) -> dict[str, int]:
    """The lines of /proc/meminfo in bytes; empty where there is none."""
    return _sizes(proc / "meminfo")


def _sizes(path: Path) -> dict[str, int]:
    """Lines such as "MemFree:  12 kB", in bytes."""
    sizes = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            sizes[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return sizes


def _sysconf(name: str) -> int:
    if not hasattr(os, "sysconf") or name not in os.sysconf_names:
        raise OctavoError(
            f"this system does not say how much memory it has (no {name}); "
            "give the size of the KV cache by num_kv_blocks (octavo serve --num-kv-blocks)"
        )
    return os.sysconf(name)


def _free_memory_by_sysconf() -> int:
    page = _sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return _sysconf("SC_AVPHYS_PAGES") * page
    # A guess, and the only one without native code: half of what is built in.
    return _sysconf("SC_PHYS_PAGES") * page // 2


def _cgroup_room(proc: Path, cgroup: Path) -> list[int]:
    """What is left below the memory limit of each control group this process lies in."""
    rooms = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            root, limit, usage, cached = cgroup, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            root, limit = cgroup / "memory", "memory.limit_in_bytes"
            usage, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            room = _group_room(root.joinpath(*parts[:depth]), limit, usage, cached)
            if room is not None:
                rooms.append(room)
    return rooms


def _group_room(group: Path, limit: str, usage: str, cached: str) -> int | None:
    """Limit minus usage of one control group; None where it has no limit ("max")."""
    most, used = _read(group / limit).strip(), _read(group / usage).strip()
    if not most.isdecimal() or not used.isdecimal():
        return None
    # Cached file pages count as used, but the kernel drops them before it refuses memory.
    reclaimable = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cached and value.strip().isdecimal():
            reclaimable = int(value)
    return int(most) - max(0, int(used) - reclaimable)


def _address_space_room(proc: Path) -> list[int]:
    """What `ulimit -v` leaves; an empty list where there is no such limit."""
    try:
        import resource
    except ImportError:  # not a Unix
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    words = _read(proc / "self" / "statm").split()
    if limit == resource.RLIM_INFINITY or not words:
        return []
    return [limit - int(words[0]) * _sysconf("SC_PAGE_SIZE")]


def _read(path: Path) -> str:
    """The text of a system file; "" where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def open_packaged_cublas() -> None:
    """Open cuBLASLt where pip has put it (nvidia-cublas, which torch brings), if it is there.

    The dynamic linker knows the system's folders, not pip's. Once a library is open, the native
    core finds it by its bare name.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.1?"):
            for path in Path(folder).glob(pattern):
                with contextlib.suppress(OSError):  # of another platform, say: octavo does without
                    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                    return
