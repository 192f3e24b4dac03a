"""What the machine gives this process: cores and memory, as control groups limit them.

The folders /proc and /sys/fs/cgroup are made up here; a few tests ask the real functions, under
limits made for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import _native
from octavo.machine import (
    Resident,
    available_memory,
    resident_memory,
    threads_of_rank,
    total_memory,
)

CORES = _native.physical_cores()


def fake_machine(tmp_path: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"proc": tmp_path / "proc", "cgroup": tmp_path / "cgroup"}


def test_ranks_share_the_threads_of_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quota of a control group is that of all of them together; a rank has one at least."""
    assert threads_of_rank(0, 1) == CORES
    assert [threads_of_rank(3, ranks) for ranks in (1, 2, 5)] == [3, 3, 3]
    monkeypatch.setattr(_native, "physical_cores", lambda: 5)
    assert [threads_of_rank(0, ranks) for ranks in (1, 2, 3, 5, 6)] == [5, 2, 1, 1, 1]


def quota_of(folders: dict[str, Path]) -> float | None:
    return _native.cpu_quota(str(folders["proc"]), str(folders["cgroup"]))


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


V1_MOUNT = "30 25 0:26 {group} {folder} rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNT = "31 25 0:27 {group} {folder} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


# What a container or a host shows, and the CPUs that it means.
QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "nothing at all": ({}, None),
    "version 2, namespace of its own": ({"cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ({"cgroup/cpu.max": "max 100000\n"}, None),
    "version 2, nested, the middle one tightest": (
        {
            "proc/self/cgroup": "0::/system.slice/x.service/inner\n",
            "cgroup/system.slice/cpu.max": "400000 100000\n",
            "cgroup/system.slice/x.service/cpu.max": "50000 50000\n",
            "cgroup/system.slice/x.service/inner/cpu.max": "max 100000\n",
            "cgroup/other.service/cpu.max": "1000 100000\n",
        },
        1.0,
    ),
    "version 1, namespace of its own": (v1("cgroup/cpu", 100_000), 1.0),
    "version 1, no limit": (v1("cgroup/cpu", -1), None),
    "version 1, cpu,cpuacct": (
        {"proc/self/cgroup": "4:cpu,cpuacct:/\n", **v1("cgroup/cpu,cpuacct", 250_000)},
        2.5,
    ),
    "version 1, cpuacct,cpu": (
        {"proc/self/cgroup": "4:cpuacct,cpu:/a\n", **v1("cgroup/cpuacct,cpu/a", 10_000, 20_000)},
        0.5,
    ),
    "version 1, nested, the outer one tightest": (
        {
            "proc/self/cgroup": "9:cpuset:/y\n3:cpu:/docker/7\n",
            **v1("cgroup/cpu/docker", 300_000),
            **v1("cgroup/cpu/docker/7", 800_000),
            **v1("cgroup/cpu/y", 1000),
        },
        3.0,
    ),
    "version 1, the host's path where only the container's own group shows": (
        {"proc/self/cgroup": "3:cpu,cpuacct:/docker/7\n", **v1("cgroup/cpu,cpuacct", 200_000)},
        2.0,
    ),
    "version 1, below the group that the container shows": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/docker/7/inner\n",
            "proc/self/mountinfo": V1_MOUNT.format(group="/docker/7", folder="{root}/cgroup/cpu"),
            **v1("cgroup/cpu/inner", 70_000),
        },
        0.7,
    ),
    "mounted elsewhere, in a folder with a space": (
        {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": V2_MOUNT.format(group="/", folder="{root}/my\\040groups"),
            "my groups/job/cpu.max": "120000 100000",
        },
        1.2,
    ),
    "outside of its namespace": (
        {
            "proc/self/cgroup": "0::/../other\n",
            "cgroup/cpu.max": "300000 100000\n",
            "other/cpu.max": "1000 100000\n",  # of no group
        },
        3.0,
    ),
    "hybrid, limited by version 1": (
        {"proc/self/cgroup": "2:cpu:/a\n0::/b\n", **v1("cgroup/cpu/a", 110_000)},
        1.1,
    ),
    "hybrid, limited by version 2": (
        {"proc/self/cgroup": "2:cpu:/a\n0::/b\n", "cgroup/unified/b/cpu.max": "90000 100000\n"},
        0.9,
    ),
    "Slurm, version 2": (
        {
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            "cgroup/system.slice/slurmstepd.scope/job_7/cpu.max": "400000 100000\n",
        },
        4.0,
    ),
    "not numbers": ({"cgroup/cpu.max": "1e5 100000\n"}, None),
    "one word": ({"cgroup/cpu.max": "100000\n"}, None),
    "no period": ({"cgroup/cpu.max": "100000 0\n"}, None),
    "too large a number": ({"cgroup/cpu.max": "99999999999999999999 100000\n"}, None),
    "empty": ({"cgroup/cpu.max": "", "proc/self/cgroup": "", "proc/self/mountinfo": ""}, None),
    "lines cut short": (
        {
            "cgroup/cpu.max": "200000 100000",
            "proc/self/cgroup": "0:\n:\n\n4",
            "proc/self/mountinfo": "1 2 3 - cgroup2\n - \n1 2 3 / /x\\04 - cgroup2 a b",
        },
        2.0,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_cpu_time(tmp_path: Path, case: str) -> None:
    files, expected = QUOTAS[case]
    folders = fake_machine(
        tmp_path, {name: text.replace("{root}", str(tmp_path)) for name, text in files.items()}
    )
    assert quota_of(folders) == expected


def test_a_quota_behind_a_link(tmp_path: Path) -> None:
    """cpu -> cpu,cpuacct, as many systems have it."""
    folders = fake_machine(
        tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/\n", **v1("cgroup/cpu,cpuacct", 100_000)}
    )
    (tmp_path / "cgroup/cpu,cpuacct").rename(tmp_path / "cgroup/both")
    (tmp_path / "cgroup/cpu").symlink_to("both")
    assert quota_of(folders) == 1.0


@pytest.mark.parametrize(
    ("quota", "threads"),
    [(1_000, 1), (100_000, 1), (124_000, 1), (125_000, 2), (200_000, 2), (374_000, 3)],
)
def test_threads_for_a_quota(tmp_path: Path, quota: int, threads: int) -> None:
    """A quarter of a core is worth a thread; there are never more threads than cores."""
    folders = fake_machine(tmp_path, {"cgroup/cpu.max": f"{quota} 100000\n"})
    found = _native.physical_cores(str(folders["proc"]), str(folders["cgroup"]))
    assert found == min(CORES, threads)


def ask_cores(*command: str) -> str:
    """What octavo finds in a process of its own."""
    show = "from octavo import _native; print(_native.build_info()['physical_cores'])"
    found = subprocess.run(
        [*command, sys.executable, "-c", show], capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stderr
    return found.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_the_cores_that_a_process_may_run_on() -> None:
    """As taskset, Slurm and cpusets give them."""
    one = str(min(os.sched_getaffinity(0)))
    if shutil.which("taskset") is None:
        pytest.skip("needs taskset (apt install util-linux)")
    assert ask_cores("taskset", "-c", one) == "1"


def can_mount() -> bool:
    """Whether a mount namespace can be made here."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/sys/fs/cgroup"]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("files", "path"),
    [
        ({"cpu.max": "100000 100000"}, ""),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, ""),
        (
            {"cpu.max": "max 100000", "system.slice/x.service/cpu.max": "100000 100000"},
            "0::/system.slice/x.service",
        ),
    ],
    ids=["version 2", "version 1", "version 2 of the host"],
)
def test_a_limit_of_one_core_on_this_machine(
    tmp_path: Path, files: dict[str, str], path: str
) -> None:
    """The real folders, with others mounted over them: one thread is planned."""
    if CORES == 1:
        pytest.skip("needs a machine with two cores or more")
    if not can_mount():
        pytest.skip("needs root and unshare, to mount a control group of its own")
    shown = {f"groups/{name}": text for name, text in files.items()}
    fake_machine(tmp_path, {**shown, "path": path + "\n"})
    script = 'mount --bind "$0/groups" /sys/fs/cgroup'
    if path:
        script += ' && mount --bind "$0/path" /proc/$$/cgroup'
    run = ["unshare", "-m", "bash", "-c", script + ' && exec "$@"', str(tmp_path)]
    assert ask_cores(*run) == "1"


def test_this_machine() -> None:
    assert 0 < available_memory() <= total_memory()


MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n"


def test_the_memory_of_the_machine(tmp_path: Path) -> None:
    folders = fake_machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_memory(**folders) == 8_000_000 * 1024
    assert total_memory(folders["proc"]) == 16_000_000 * 1024


def test_a_control_group_lowers_it(tmp_path: Path) -> None:
    """Version 2: the tightest of the groups above the process counts, cached pages do not."""
    folders = fake_machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/job.slice/step\n",
            "cgroup/job.slice/memory.max": "5000000000\n",
            "cgroup/job.slice/memory.current": "3000000000\n",
            "cgroup/job.slice/memory.stat": "anon 1\ninactive_file 1000000000\nslab 7\n",
            "cgroup/job.slice/step/memory.max": "max\n",
            "cgroup/job.slice/step/memory.current": "3000000000\n",
        },
    )
    assert available_memory(**folders) == 3_000_000_000


def test_a_control_group_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n3:memory:/slurm/job_7\n",
        "cgroup/memory/slurm/job_7/memory.limit_in_bytes": "2000000000\n",
        "cgroup/memory/slurm/job_7/memory.usage_in_bytes": "500000000\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cgroup/memory/memory.usage_in_bytes": "500000000\n",
    }
    assert available_memory(**fake_machine(tmp_path, files)) == 1_500_000_000


def test_an_exceeded_group_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": "1000\n",
        "cgroup/memory.current": "4000\n",
    }
    assert available_memory(**fake_machine(tmp_path, files)) == 0


def test_a_machine_without_proc(tmp_path: Path) -> None:
    folders = {"proc": tmp_path / "none", "cgroup": tmp_path / "none"}
    assert 0 < available_memory(**folders) <= total_memory(folders["proc"])


def test_what_this_process_takes(tmp_path: Path) -> None:
    assert resident_memory(tmp_path) is None
    (tmp_path / "self").mkdir()
    status = tmp_path / "self" / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert resident_memory(tmp_path) == Resident(now=1 << 20, peak=2 << 20)
    status.write_text("Name:\tpython\nVmRSS:\t    1024 kB\n")
    assert resident_memory(tmp_path) is None
    real = resident_memory()
    assert real is None or 0 < real.now <= real.peak


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is read on Linux")
def test_a_limit_of_the_shell_lowers_it(tmp_path: Path) -> None:
    """`ulimit -v`, far above what is there: it may not get in this process's way."""
    import resource

    meminfo = "MemAvailable: 99999999999999 kB\n"
    folders = fake_machine(tmp_path, {"proc/meminfo": meminfo, "proc/self/statm": "1000 5 5\n"})
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = 1 << 47
    if before[1] != resource.RLIM_INFINITY:
        pytest.skip(f"needs a process without a hard limit of its memory; it is {before[1]} bytes")
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        left = limit - 1000 * resource.getpagesize()
        assert available_memory(**folders) == left
        assert available_memory(**folders, reserved=5_000_000) == left + 5_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_slurm_job_of_version_2(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
        "cgroup/system.slice/slurmstepd.scope/job_7/memory.max": "2000000000\n",
        "cgroup/system.slice/slurmstepd.scope/job_7/memory.current": "500000000\n",
        "cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/memory.max": "max\n",
    }
    assert available_memory(**fake_machine(tmp_path, files)) == 1_500_000_000


@pytest.mark.parametrize("text", ["", "max", "-5", "99999999999999999999", "1 kB MemAvailable:"])
def test_memory_figures_without_sense(tmp_path: Path, text: str) -> None:
    """They limit nothing."""
    names = ["cgroup/memory.max", "cgroup/memory/memory.limit_in_bytes", "proc/self/statm"]
    used = {"cgroup/memory.current": "1\n", "cgroup/memory/memory.usage_in_bytes": text}
    files = {"proc/meminfo": MEMINFO, **used, **dict.fromkeys(names, text)}
    if text.startswith("1 "):
        files = {"proc/meminfo": text, **used}
    folders = fake_machine(tmp_path, files)
    expected = total_memory() if text.startswith("1 ") else 8_000_000 * 1024
    assert 0 < available_memory(**folders) <= expected


def test_a_figure_that_fits_only_in_kibibytes(tmp_path: Path) -> None:
    files = {"proc/meminfo": f"MemAvailable: {2**53 + 1} kB\n"}
    files |= {"cgroup/memory.max": "1000\n", "cgroup/memory.current": "1\n"}
    assert available_memory(**fake_machine(tmp_path, files)) == 999


FILES = ["proc/meminfo", "proc/self/cgroup", "proc/self/mountinfo", "proc/self/statm"]
FILES += ["cgroup/cpu.max", "cgroup/memory.max", "cgroup/memory.current", "cgroup/memory.stat"]
PARTS = [
    b"0::/a/..",
    b"3:cpu,memory:/",
    b" - cgroup2 x",
    b"\\040",
    b"\\",
    b"max",
    b" ",
    b":",
    b"\n",
]
PARTS += [b"/", b"..", b"9" * 19, b"100000", b"-1", b"MemAvailable: 7 kB", b"\xff\x00"]
contents = st.lists(st.sampled_from(PARTS), max_size=12).map(b"".join) | st.binary(max_size=40)


@given(st.lists(contents, min_size=len(FILES), max_size=len(FILES)))
def test_files_of_any_content(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    """Nothing crashes, and nobody gets more than there is or less than one thread."""
    root = tmp_path_factory.mktemp("machine")
    folders = fake_machine(root, dict.fromkeys(FILES, ""))
    for name, text in zip(FILES, texts, strict=True):
        (root / name).write_bytes(text)
    assert available_memory(**folders) >= 0
    quota = quota_of(folders)
    assert quota is None or quota > 0
    cores = _native.physical_cores(str(folders["proc"]), str(folders["cgroup"]))
    assert 1 <= cores <= CORES
