"""Joules that the machine counts: RAPL of the processor's packages, NVML of NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")


class Meter:
    """Counters that only rise; `joules` reads them. Those that are not readable are left out.

    missing: why there is none of the processor or of a GPU, for the list of gaps.
    """

    def __init__(self, folder: Path = RAPL, nvml: bool = True) -> None:
        self.missing: dict[str, str] = {}
        packages = sorted(folder.glob("intel-rapl:[0-9]*")) if folder.is_dir() else []
        self._packages = [each for each in packages if ":" not in each.name.partition(":")[2]]
        self._wraps = [0.0] * len(self._packages)
        self._last: list[float] = []
        try:
            self._last = self._read_packages()
        except (OSError, ValueError) as error:
            self.missing["cpu"] = f"RAPL cannot be read: {error}"
            self._packages = []
        if not self._packages:
            self.missing.setdefault("cpu", "the machine has no RAPL counters")
        self._gpus: list[Any] = []
        try:
            self._gpus = _handles() if nvml else []
        except Exception as error:
            self.missing["gpu"] = f"NVML: {error}"

    def joules(self) -> dict[str, float]:
        """ "cpu" and "gpu": joules since an arbitrary moment, of those that are counted."""
        found = {}
        if self._packages:
            now = self._read_packages()
            for index, (before, after) in enumerate(zip(self._last, now, strict=True)):
                if after < before:  # it begins anew at its limit
                    limit = self._packages[index] / "max_energy_range_uj"
                    self._wraps[index] += float(limit.read_text(encoding="utf-8"))
            self._last = now
            found["cpu"] = (sum(now) + sum(self._wraps)) / 1e6
        if self._gpus:
            import pynvml

            energies = map(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._gpus)
            found["gpu"] = sum(energies) / 1e3
        return found

    def _read_packages(self) -> list[float]:
        files = [package / "energy_uj" for package in self._packages]
        return [float(file.read_text(encoding="utf-8")) for file in files]


def _handles() -> list[Any]:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError_LibraryNotFound):
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    raise OSError("no NVIDIA driver")
