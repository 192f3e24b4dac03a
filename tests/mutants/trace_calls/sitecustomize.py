"""Notes which functions each test calls, also in the processes it starts, for `make mutants`.

Python imports this file by itself where its folder is on PYTHONPATH; pytest takes it for a plugin
with `-p sitecustomize` (PYTEST_DONT_REWRITE: it is imported before pytest). After every test, and
at the end of a process that a test started, a line of JSON is added to the file $OCTAVO_CALLS: the
test, its seconds, and what it called as "path:first line", the path being from the tree's root.
"""

import atexit
import json
import os
import sys
import threading
import time

_called = {}
_started = time.monotonic()


def _note_call(frame, event, argument):
    """Called at every call; returns None, so that the lines of the function are not traced."""
    _called[id(frame.f_code)] = frame.f_code


def _write(test):
    global _started
    codes, now = list(_called.values()), time.monotonic()
    _called.clear()
    root = os.environ["OCTAVO_ROOT"] + os.sep
    calls = ["native"] if "octavo._native" in sys.modules else []
    for code in codes:
        if code.co_filename.startswith(root):  # also through the link to reference/
            path = os.path.realpath(code.co_filename)[len(root) :]
            calls.append(f"{path}:{code.co_firstlineno}")
    with open(os.environ["OCTAVO_CALLS"], "a") as file:
        file.write(json.dumps([test, now - _started, calls]) + "\n")
    _started = now


def pytest_runtest_logfinish(nodeid):
    _write(nodeid)


if "OCTAVO_CALLS" in os.environ:
    if "PYTEST_CURRENT_TEST" in os.environ:  # "test (call)" of the process that started this one
        atexit.register(_write, os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
    threading.settrace(_note_call)
    sys.settrace(_note_call)
