"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before NumPy is imported. Several tests run at a time, and octavo has threads of its own: BLAS's
# would wait for each other in loops that take the cores from all of them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Machines that run tests are slow and shared: time limits would fail good code. The examples are
# the same in every run unless OCTAVO_TEST_EXPLORE asks for new ones.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("explore" if os.environ.get("OCTAVO_TEST_EXPLORE") else "default")
