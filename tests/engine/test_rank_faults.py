"""Processes of a divided model that end, fail or are killed: clear errors at once, nothing is left.

What cannot be tried within pytest's own process runs as a program.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import write_float_model
from rank_helpers import DIVISIBLE, LIMITS, children, load_llm, processes_of

from octavo.errors import (
    InsufficientMemoryError,
    InvalidArgumentError,
    OctavoError,
    RankError,
    WeightsError,
)
from octavo.llm import LLM
from octavo.runtime import ranks
from octavo.sampling_params import SamplingParams
from octavo.weights.checkpoint import NonFiniteWeightsWarning

LONG = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)
PROMPTS = [[3, 9, 27], [5, 1]]
SECONDS = 4.0  # for what should take a tenth of one; machines that run tests are shared


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float_model(tmp_path_factory.mktemp("model") / "float", "F32", **DIVISIBLE)


def answers(llm: LLM) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, LONG, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until_ended(pids: list[int], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


# ---- ranks that are killed ----


@pytest.mark.parametrize("moment", ["between steps", "within a step"])
def test_a_rank_is_killed(path: Path, moment: str) -> None:
    llm = load_llm(path, 2)
    answers(llm)
    (process,) = processes_of(llm)
    begin = time.monotonic()
    if moment == "between steps":
        process.kill()
    else:
        threading.Timer(0.05, process.kill).start()
    with pytest.raises(RankError, match=r"rank 1 .* status -9 \(SIGKILL\).*load the model again"):
        while time.monotonic() < begin + SECONDS:
            answers(llm)
    with pytest.raises(RankError):  # those that come later, too
        answers(llm)
    llm.close()
    assert time.monotonic() - begin < SECONDS


def test_a_step_that_fails_in_one_rank_ends_the_model(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(
        monkeypatch,
        """
        def submit(self, *arguments, original=module._RankRuntime.submit, count=[0]):
            count[0] += 1
            if count[0] == 3:
                raise ZeroDivisionError("in the third step")
            original(self, *arguments)
        module._RankRuntime.submit = submit
        """,
    )
    llm = load_llm(path, 2)
    processes = processes_of(llm)
    for _ in range(2):
        with pytest.raises(RankError, match="rank 1: ZeroDivisionError: in the third step: load"):
            answers(llm)
    llm.close()
    assert [process.wait(SECONDS) for process in processes] == [0]


def test_a_long_error_in_another_script_arrives(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "module._RankRuntime.submit = lambda *_: [][int('ä' * 2000)]")
    with (
        load_llm(path, 2) as llm,
        pytest.raises(RankError, match="^rank 1: ValueError: .*äää: load"),
    ):
        answers(llm)


def test_a_step_that_fails_in_rank_0_ends_the_others(path: Path) -> None:
    llm = load_llm(path, 2)
    runtime = llm.engine.runtime
    own, processes = runtime._own, processes_of(llm)

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

        def wait(self, ticket: int) -> Any:
            raise RuntimeError("the device fell off the bus")

    runtime._own = Failing()  # type: ignore[assignment]
    with pytest.raises(RankError, match="fell off the bus: load the model again"):
        answers(llm)
    llm.close()
    assert [process.wait(SECONDS) for process in processes] == [0]


# ---- ranks that do not start ----


def plant(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let other ranks run code, in which `module` is runtime/rank_process.py, before they serve."""
    lines = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
    first, _, last = ranks._PROGRAM.rpartition("main()")
    planted = lines.replace("{", "{{").replace("}", "}}")
    program = f"{first}\nimport octavo.runtime.rank_process as module\n{planted}\nmain(){last}"
    monkeypatch.setattr(ranks, "_PROGRAM", program)


FAILURES: dict[str, tuple[str, type[Exception], str]] = {
    "ends at once": ("import os; os._exit(7)", RankError, "with status 7;"),
    "is not found": ("import no_such_module", RankError, "with status 1;"),
    "ends while loading": (
        "import os; module.fill = lambda prepared: os._exit(5)",
        RankError,
        "with status 5;",
    ),
    "wrong option": (
        """
        from octavo.errors import InvalidArgumentError
        def prepare(*arguments):
            raise InvalidArgumentError("dtype is \\"x\\"; expected another")
        module.prepare = prepare
        """,
        InvalidArgumentError,
        '^dtype is "x"; expected another$',
    ),
    "no room": (
        """
        from octavo.errors import InsufficientMemoryError
        def prepare(*arguments):
            raise InsufficientMemoryError("too little", [dict(max_num_seqs=1)])
        module.prepare = prepare
        """,
        InsufficientMemoryError,
        "^too little: use max_num_seqs=1, or free memory$",
    ),
    "no room for weights": (
        """
        def fill(*arguments):
            raise MemoryError
        module.fill = fill
        """,
        InsufficientMemoryError,
        "could not be allocated",
    ),
    "damaged weights": (
        """
        from octavo.errors import WeightsError
        def fill(*arguments):
            raise WeightsError("two problems", ["one", "other"])
        module.fill = fill
        """,
        WeightsError,
        "other",
    ),
    "an error that cannot be sent": (
        """
        class Odd(Exception):
            def __init__(self, one, other):
                super().__init__(f"odd {one} {other}")
        def fill(*arguments):
            raise Odd(3, 4)
        module.fill = fill
        """,
        RuntimeError,
        "^Odd: odd 3 4$",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_does_not_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, kind, text = FAILURES[failure]
    plant(monkeypatch, code)
    files, begin = open_files(), time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        load_llm(path, 2)
    assert type(caught.value) is kind and time.monotonic() - begin < SECONDS
    del caught
    gc.collect()  # the traceback holds the files of the weights
    assert open_files() <= files
    wait_until_ended(children())
    said = capfd.readouterr().err  # of the rank itself: only where nothing else could tell
    assert ("no_such_module" in said) == ("Traceback" in said) == (failure == "is not found")


def test_what_does_not_fit_leaves_no_process(path: Path) -> None:
    """It is refused after the weights were loaded; a program may keep the error."""
    with pytest.raises(InvalidArgumentError, match="num_kv_blocks is 1") as caught:
        load_llm(path, 2, num_kv_blocks=1)
    wait_until_ended(children())
    assert "raise it" in str(caught.value)
    with pytest.raises(OctavoError, match="no-adapter is not a directory") as caught:
        load_llm(path, 2, adapters={"a": str(path / "no-adapter")})
    wait_until_ended(children())
    with pytest.raises(InvalidArgumentError, match="cannot be divided evenly: use 2, 4, 8 or 1"):
        load_llm(path, 3)


@pytest.mark.parametrize("weight", ["up_proj", "o_proj"])
def test_a_nan_in_the_part_of_another_rank_is_warned_of(tmp_path: Path, weight: str) -> None:
    from weights_helpers import random_weights, tiny_config, write_model

    config = tiny_config(**DIVISIBLE)
    weights = random_weights(config)
    name = f"model.layers.1.{'mlp' if weight == 'up_proj' else 'self_attn'}.{weight}.weight"
    weights[name][-1, -1] = np.nan  # the last row and the last column are those of the last rank
    write_model(tmp_path, config, weights=weights)
    with pytest.warns(NonFiniteWeightsWarning, match=rf"layers\.1\.{weight.partition('_')[0]}"):
        load_llm(tmp_path, 2).close()


@pytest.mark.parametrize(
    "error",
    [
        RankError("rank 3 has ended"),
        InsufficientMemoryError("p", [{"quantize": "int8"}]),
        InsufficientMemoryError("p", (), "buy some"),
        WeightsError("s", [str(i) for i in range(12)]),
        InvalidArgumentError("x is 1; expected 2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel(error: OctavoError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


# ---- the end of a model ----


def test_a_model_leaves_no_process_and_no_file(path: Path) -> None:
    load_llm(path, 2).close()  # what is opened once stays open
    files, threads = open_files(), threading.active_count()
    for end in ("close", "del"):
        llm = load_llm(path, 2)
        pids = [process.pid for process in processes_of(llm)]
        assert answers(llm)
        assert all(map(is_running, pids))
        if end == "close":
            llm.close()
        del llm
        wait_until_ended(pids)
    time.sleep(0.1)
    assert open_files() == files
    assert threading.active_count() == threads


def test_two_divided_models_and_more_ranks_than_cores(path: Path) -> None:
    expected = answers(load_llm(path, 1, dtype="f32"))
    first, second = (load_llm(path, ranks, dtype="f32") for ranks in (2, 4))
    found: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda name=name, llm=llm: found.update({name: answers(llm)}))
        for name, llm in {"first": first, "second": second}.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": expected, "second": expected}
    first.close()
    assert answers(second) == expected


# ---- programs ----

HEAD = f"""
import os, signal, sys, threading, time
from octavo import LLM, SamplingParams
def load(ranks=2):
    return LLM(sys.argv[1], tensor_parallel_size=ranks, **{LIMITS!r})
def answer(llm):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)
    return llm.generate([[3, 9, 27]], params, progress=False)[0].outputs[0].token_ids
def pids(llm):
    return [process.pid for process in llm.engine.runtime._team._processes]
"""


def start(path: Path, code: str, **options: Any) -> subprocess.Popen[str]:
    program = options.pop("file", None)
    command = [sys.executable, *(["-c", HEAD + code] if program is None else [str(program)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*command, str(path)], **{**pipes, **options})


def finished(process: subprocess.Popen[str], seconds: float = 20) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_a_plain_script_in_a_folder_with_files_named_as_modules(path: Path, tmp_path: Path) -> None:
    """It has no `if __name__ == "__main__"`, reads a pipe, and only the script's folder counts."""
    for name in ("json", "numpy", "random", "octavo", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "script.py"
    script.write_text(HEAD + "print(len(answer(load())), sys.stdin.read())\n")
    process = start(path, "", file=script, cwd=tmp_path, stdin=subprocess.PIPE)
    out, err = process.communicate("from a pipe", timeout=20)
    assert (process.returncode, out, err) == (0, "40 from a pipe\n", "")


ENDS = {
    "rank 0 is killed": (signal.SIGKILL, "print(*pids(llm), flush=True)\nwhile True: answer(llm)"),
    "rank 0 is killed when idle": (signal.SIGKILL, "print(*pids(llm), flush=True)\ntime.sleep(60)"),
    "Ctrl-C": (signal.SIGINT, "print(*pids(llm), flush=True)\nwhile True: answer(llm)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_program(path: Path, end: str) -> None:
    number, code = ENDS[end]
    process = start(path, "llm = load()\n" + code, start_new_session=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.1)
    assert pids and all(map(is_running, pids))
    if number == signal.SIGINT:  # a terminal sends it to all processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    status, _, error = finished(process)
    assert status == -number
    assert error.count("Traceback") == error.count("KeyboardInterrupt") == (number == signal.SIGINT)
    wait_until_ended(pids)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.08])
def test_ctrl_c_while_ranks_start(path: Path, delay: float) -> None:
    """One traceback, rank 0's own."""
    code = f"""
def interrupt():
    tasks = "/proc/self/task"
    while not any(open(f"{{tasks}}/{{task}}/children").read() for task in os.listdir(tasks)):
        pass
    time.sleep({delay})
    os.killpg(0, signal.SIGINT)
threading.Thread(target=interrupt).start()
llm = load()
time.sleep(60)
"""
    status, _, error = finished(start(path, code, start_new_session=True))
    assert status == -signal.SIGINT
    assert error.count("Traceback") == 1, error


def test_a_fork_that_ends_harms_nobody(path: Path) -> None:
    code = """
llm = load()
want = answer(llm)
for end in ("exit", "close"):
    pid = os.fork()
    if pid == 0:
        if end == "close":
            try:
                llm.close()
            except Exception:
                pass
            del llm
        sys.exit(0)
    begin = time.monotonic()
    _, status = os.waitpid(pid, 0)
    print(end, status, time.monotonic() - begin < 3, answer(llm) == want)
pid = os.fork()  # it holds the connection, and goes on
if pid == 0:
    time.sleep(20)
    os._exit(0)
others, begin = pids(llm), time.monotonic()
llm.close()
print(time.monotonic() - begin < 3)
os.kill(pid, 9)
"""
    status, out, error = finished(start(path, code))
    assert (status, out) == (0, "exit 0 True True\nclose 0 True True\nTrue\n"), error
    assert "Traceback" not in error


def test_a_model_is_loaded_and_left_in_threads(path: Path) -> None:
    """And the program ends while one is computing."""
    code = """
made = []
threads = [threading.Thread(target=lambda: made.append(load())) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(answer(made[0]) == answer(made[1]))
def work():
    while True: answer(made[0])
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print(*pids(made[0]), *pids(made[1]))
"""
    status, out, error = finished(start(path, code))
    same, pids = out.splitlines()
    assert (status, same, error) == (0, "True", "")
    wait_until_ended([int(pid) for pid in pids.split()])
