"""A process that was forked after loading is refused at every door, ends, and harms nobody.

In one program, since its start takes longer than the cases: the parent loads a model on two
threads, keeps one of Python's threads busy with it, has a stream open half-way, and forks. It must
go on after every case.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from weights_helpers import tiny_config, write_model

PROGRAM = """
import asyncio, gc, json, multiprocessing, os, sys, threading, time
import numpy as np
from octavo import LLM, SamplingParams
from octavo.errors import WrongProcessError
from octavo.prompts import EncodedPrompt
from octavo.server.engine_thread import EngineThread
from octavo.server.stream import EngineRequest

def report(result):
    print(result, flush=True)

def told(*functions):
    # "told" for each that says what is wrong, else what it does
    for function in functions:
        try:
            report(f"answered {function()}")
        except WrongProcessError as error:
            ok = str(parent) in str(error) and str(os.getpid()) in str(error)
            report("told" if ok and "load it in" in str(error) else error)
        except RuntimeError as error:
            report("told" if f"process {os.getpid()}, a fork of it" in str(error) else error)

def load():
    return LLM(sys.argv[1], max_model_len=256, num_threads=2)

if __name__ == "__main__":
    parent = os.getpid()
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    llm = load()
    want = llm.generate([1, 2], params, progress=False)[0].outputs
    stream = llm.stream([1, 2], params)
    next(stream)
    is_done = False

    def work():
        global being_read
        while not is_done:
            being_read = llm.stream([1, 2], params)
            assert list(being_read)[-1].result.outputs == want

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.1)

    def fork(function):
        child = os.fork()
        if not child:
            function()
            sys.exit(7)  # through all of Python's tidying up
        for _ in range(1500):
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.01)
        os.kill(child, 9)
        report("the child waits for ever")

    try:
        for name, code in json.loads(sys.argv[2]).items():
            report(f"case {name}")
            for _ in range(3):
                exec(code)
    finally:
        is_done = True
        worker.join()
    assert [c for c in stream][-1].result.outputs == want
    assert llm.generate([1, 2], params, progress=False)[0].outputs == want
    llm.engine.check_integrity()
"""

CASES = {
    "LLM": (
        "fork(lambda: told(lambda: llm.generate([1]), lambda: llm.chat([{'role': 'user'}]),"
        " lambda: llm.stream([1]), lambda: llm.generate_as_completed([]), lambda: next(stream),"
        " lambda: next(being_read), lambda: llm.between_steps(lambda engine: 1)))",
        ["told"] * 21,
    ),
    "engine": (
        "fork(lambda: told(lambda: llm.engine.step(), lambda: llm.engine.abort('0'),"
        " lambda: llm.engine.add_request('x', [1], params)))",
        ["told"] * 9,
    ),
    "runtime": (
        "runtime = llm.engine.runtime\n"
        "pairs = np.zeros((1, 2), np.int32)\n"
        "fork(lambda: told(lambda: runtime.counts(), lambda: runtime.wait(0),"
        " lambda: runtime.copy_blocks(0, pairs), lambda: runtime.alloc_kv(3),"
        " lambda: runtime.logits(0)))",
        ["told"] * 15,
    ),
    "an end without a question": ("fork(lambda: None)", []),
    "an end with everything dropped": (
        "def drop():\n"
        "    global llm, stream\n"
        "    stream.close()\n"
        "    del llm, stream\n"
        "    report(gc.collect() >= 0)\n"
        "fork(drop)",
        ["True"] * 3,
    ),
    "a model of its own": (
        "fork(lambda: report(load().generate([1, 2], params, progress=False)[0].outputs == want))",
        ["True"] * 3,
    ),
    "multiprocessing": (
        "process = multiprocessing.get_context('fork').Process(\n"
        "    target=lambda: told(lambda: llm.generate([1])))\n"
        "process.start()\n"
        "process.join(15)\n"
        "report(process.exitcode)",
        ["told", "0"] * 3,
    ),
    "a pool": (
        "def ask(number):\n"
        "    return llm.generate([number])\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    try:\n"
        "        pool.map(ask, [1, 2])\n"
        "    except WrongProcessError as error:\n"
        "        report((error.pid == parent, error.this_pid == parent))",
        ["(True, False)"] * 3,
    ),
    "a server in the child": (
        "async def serve():\n"
        "    thread = EngineThread(lambda: llm)\n"
        "    loaded = thread.start()\n"
        "    await asyncio.wait([loaded])\n"
        "    told(loaded.result)\n"
        "    report(thread.health().ok)\n"
        "fork(lambda: asyncio.run(serve()))",
        ["told", "False"] * 3,
    ),
    "a server in the parent": (
        "async def serve():\n"
        "    thread = EngineThread(load)\n"
        "    await thread.start()\n"
        "    request = EngineRequest('1', EncodedPrompt(None, [1, 2]), params)\n"
        "    def ask():\n"
        "        report(type(thread.submit(request)._error).__name__[:5])\n"
        "        os._exit(0)  # to close its copy of asyncio's loop would harm the parent's\n"
        "    fork(ask)\n"
        "    report((await thread.submit(request).wait()).outputs == want)\n"
        "    await thread.stop()\n"
        "asyncio.run(serve())",
        ["Wrong", "True"] * 3,
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, tiny_config(max_position_embeddings=256))
    codes = json.dumps({case: code for case, (code, _) in CASES.items()})
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(directory), codes],
        capture_output=True,
        text=True,
        timeout=200,
    )


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


@pytest.mark.parametrize("case", CASES)
def test_a_forked_child_is_told_and_ends(
    found: subprocess.CompletedProcess[str], case: str
) -> None:
    _, _, after = found.stdout.partition(f"case {case}\n")
    assert after.partition("case ")[0].split("\n")[:-1] == CASES[case][1], found.stderr


def test_the_parent_goes_on(found: subprocess.CompletedProcess[str]) -> None:
    assert (found.stderr, found.returncode) == ("", 0)
