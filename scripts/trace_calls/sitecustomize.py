"""Notes which functions a Python process and those it starts call, for `make mutants`.

Python imports this file by itself where its folder is on PYTHONPATH. At its end the process appends
to the file $OCTAVO_CALLS a line "path:first line" for every function it called, the path being from
the root of the tree, and the line "native" if it loaded the native module.
"""

import atexit
import os
import sys
import threading

_called = {}


def _note_call(frame, event, argument):
    """Called at every call; returns None, so that the lines of the function are not traced."""
    _called[id(frame.f_code)] = frame.f_code


def _write_calls():
    sys.settrace(None)
    root = os.environ["OCTAVO_ROOT"] + os.sep
    lines = {"native"} if "octavo._native" in sys.modules else set()
    for code in list(_called.values()):
        if code.co_filename.startswith(root):  # through the link to reference/, too
            path = os.path.realpath(code.co_filename)[len(root) :]
            lines.add(f"{path}:{code.co_firstlineno}")
    with open(os.environ["OCTAVO_CALLS"], "a") as file:
        file.write("\n".join([*lines, ""]))


if "OCTAVO_CALLS" in os.environ:
    atexit.register(_write_calls)
    threading.settrace(_note_call)
    sys.settrace(_note_call)
