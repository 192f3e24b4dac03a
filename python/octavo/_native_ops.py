"""The core's ops one by one, for tests and benchmarks: a module in the library of octavo._native.

A library of its own would need a core of its own, of many megabytes with CUDA, or a C++ interface
between libraries, which may each bring their own standard library. One library may hold several
modules (PEP 489), of which the import system finds only the one that the file is named after.
"""

import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

from octavo import _native

_loader = ExtensionFileLoader(__name__, str(_native.__file__))
_spec = spec_from_loader(__name__, _loader)
if _spec is None:
    raise ImportError(f"{_native.__file__} cannot be loaded as {__name__}")
_module = module_from_spec(_spec)
_loader.exec_module(_module)
sys.modules[__name__] = _module
