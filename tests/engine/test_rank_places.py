"""Which cores and which GPU a rank has, and the memory that ranks share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from quantization_helpers import write_float_model
from rank_helpers import DIVISIBLE, load_session, processes_of
from runtime_helpers import tiny_spec

import octavo
from octavo import _native
from octavo.errors import InvalidArgumentError
from octavo.machine import core_share
from octavo.models.layer import model_nodes
from octavo.models.shards import Shard, shard_spec
from octavo.models.spec import MoeSpec, NormSpec
from octavo.runtime.ranks import WHOLE_TAPS, Rank, on_own_cores, shard_adapter


def machine(folder: Path, sockets: int, cores: int, threads: int = 2) -> Path:
    """Linux's folder of a machine: processor p, the t-th thread of its core, is on any socket."""
    total = sockets * cores
    for thread in range(threads):
        for core in range(total):
            place = folder / f"cpu{thread * total + core}" / "topology"
            place.mkdir(parents=True)
            (place / "physical_package_id").write_text(f"{core % sockets}\n")  # in turn
            siblings = ",".join(str(t * total + core) for t in range(threads))
            (place / "thread_siblings_list").write_text(siblings + "\n")
    return folder


@pytest.mark.parametrize(
    ("sockets", "cores", "parts"), [(2, 4, 2), (2, 6, 4), (1, 5, 3), (12, 1, 2)]
)
def test_cores_are_shared_whole_and_by_sockets(
    tmp_path: Path, sockets: int, cores: int, parts: int
) -> None:
    total = sockets * cores
    system, everything = machine(tmp_path, sockets, cores), range(2 * total)
    shares = [core_share(everything, part, parts, system) for part in range(parts)]
    assert sorted(core for share in shares for core in share) == [*everything]
    for share in shares:
        assert {core % total for core in share} == {core % total for core in share if core < total}
        assert all((core + total) % (2 * total) in share for core in share)  # both threads
        assert len(share) // 2 in (total // parts, total // parts + 1)
    if parts % sockets == 0:
        for share in shares:
            assert len({core % total % sockets for core in share}) == 1


def test_only_cores_that_the_process_may_use_are_shared(tmp_path: Path) -> None:
    system = machine(tmp_path, 2, 4)
    allowed = {1, 3, 9, 6, 2}  # processors 1 and 9 are one core
    shares = [core_share(allowed, part, 2, system) for part in range(2)]
    assert shares == [{2, 6}, {1, 3, 9}]
    # More ranks than cores: they share them.
    assert [core_share({1, 3, 9}, part, 4, system) for part in range(4)] == [{1, 9}, {3}] * 2
    assert core_share({4, 7}, 1, 2, tmp_path / "none") == {7}  # a system that does not say


def test_a_rank_computes_on_its_cores_and_gives_the_others_back() -> None:
    memory = os.memfd_create("ranks")
    os.truncate(memory, _native.RankGroup.memory_bytes(2))
    before = os.sched_getaffinity(0)
    for number in range(2):
        rank = Rank(number, 2, _native.RankGroup(memory, number, 2))
        with pytest.raises(KeyError), on_own_cores(rank):
            assert os.sched_getaffinity(0) == core_share(before, number, 2)
            raise KeyError
        assert os.sched_getaffinity(0) == before
    os.close(memory)


def test_octavo_is_found_by_a_path_that_no_longer_leads_there(tmp_path: Path) -> None:
    path = write_float_model(tmp_path / "model", "F32", **DIVISIBLE)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "octavo").symlink_to(Path(octavo.__file__).parent)
    program = """if True:
        import os, sys
        def is_of_octavo_alone(path):
            return os.path.exists(path + "/octavo") and not os.path.exists(path + "/numpy")
        sys.path[:] = [path for path in sys.path if not is_of_octavo_alone(path)]
        sys.path.insert(0, "library")
        from octavo import LLM, SamplingParams
        os.chdir("/")
        llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu")
        print(len(llm.generate([[3, 4]], SamplingParams(max_tokens=5), progress=False)))
    """
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PATH": os.environ["PATH"],
    }
    command = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert (run.returncode, run.stdout) == (0, "1\n"), run.stderr


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = os.memfd_create("ranks")
    os.truncate(memory, _native.RankGroup.memory_bytes(3))
    rank = Rank(2, 3, _native.RankGroup(memory, 2, 3))
    os.close(memory)
    assert rank.device_index("cpu") == rank.device_index("cuda_emulated") == 0
    for count, expected in ((0, 0), (3, 2), (8, 2)):  # without any, the core says what is missing
        monkeypatch.setattr(_native, "build_info", lambda count=count: {"num_devices": count})
        assert rank.device_index("cuda") == expected
    monkeypatch.setattr(_native, "build_info", lambda: {"num_devices": 2})
    with pytest.raises(InvalidArgumentError, match=r"is 3, .* 2 GPUs; .*lower it"):
        rank.device_index("cuda")


def test_parts_of_an_adapter_add_up() -> None:
    """B (A x) of an adapter, of both kinds of matrices, and of one that every rank has whole."""
    generator = np.random.default_rng(3)
    whole = {
        name: (generator.standard_normal((3, inputs)), generator.standard_normal((outputs, 3)))
        for name, (outputs, inputs) in {"q": (8, 5), "o": (5, 8), "embed": (5, 7)}.items()
    }
    matrices = {name: (a.astype("f"), b.astype("f")) for name, (a, b) in whole.items()}
    products = {"q": [], "o": [], "embed": []}  # type: ignore[var-annotated]
    for rank in range(2):
        cuts = {
            "q.weight": Shard("q.weight", 0, 4 * rank, 4 * rank + 4),
            "o.weight": Shard("o.weight", 1, 4 * rank, 4 * rank + 4),
        }
        part = shard_adapter(matrices, cuts)
        assert all(array.flags.c_contiguous for pair in part.values() for array in pair)
        for name, (a, b) in part.items():
            products[name].append(b @ a)
    full = {name: b @ a for name, (a, b) in matrices.items()}
    np.testing.assert_allclose(np.concatenate(products["q"]), full["q"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(products["o"], 1), full["o"], rtol=1e-5, atol=1e-6)
    for found in products["embed"]:
        np.testing.assert_array_equal(found, full["embed"])


def test_taps_that_every_rank_has_whole() -> None:
    """They are as wide as those of the whole model."""
    found: dict[str, bool] = {}
    for moe in (None, MoeSpec(4, 2)):
        spec = tiny_spec(output_norm=NormSpec(), qk_norm="head", moe=moe)
        pairs = zip(model_nodes(spec), model_nodes(shard_spec(spec, 0, 2)), strict=True)
        found |= {node.part: node.width == part.width for node, part in pairs}
    assert {name for name, is_whole in found.items() if is_whole} == {*WHOLE_TAPS}


def test_a_rank_ends_while_its_step_waits(tmp_path: Path) -> None:
    """Rank 0 may end before it begins the step that it has told of."""
    path = write_float_model(tmp_path / "model", "F32", **DIVISIBLE)
    session = load_session(path, 2)
    runtime = session.loaded.runtime
    (process,) = processes_of(session.loaded)
    own, runtime._own = runtime._own, SimpleNamespace(submit=lambda *_: 0)
    session.submit({0: [3, 4, 5]})
    runtime._own = own
    time.sleep(0.2)
    assert process.poll() is None
    runtime._team._connections[0].close()
    assert process.wait(10) == 0


def test_a_runtime_is_dropped_while_its_step_waits(tmp_path: Path) -> None:
    """Of the rank that it waits for, a thread of Python has yet to hear that it has ended."""
    path = write_float_model(tmp_path / "model", "F32", **DIVISIBLE)
    session = load_session(path, 2)
    (process,) = processes_of(session.loaded)
    process.send_signal(signal.SIGSTOP)
    session.submit({0: [3, 4, 5]})
    threading.Timer(0.3, process.kill).start()
    start = time.monotonic()
    del session
    assert 0.2 < time.monotonic() - start < 5
    assert process.wait(10) == -signal.SIGKILL
