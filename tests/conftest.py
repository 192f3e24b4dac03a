"""Settings that all tests share."""

from __future__ import annotations

import os
from collections import Counter

import pytest
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--every N`, to save time: `make test`, sanitizers."""
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="run one in N variants of each test"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says what is left out; pytest counts it as deselected."""
    every = config.getoption("--every")
    return f"of each test with several variants, one in {every}" if every > 1 else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the first variant of each test, and one in N of the others.

    Multiples of the golden ratio choose them: these spread evenly, where every third variant may
    always be the same one of three types.
    """
    every = config.getoption("--every")
    kept, left, seen = [], [], Counter[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        (kept if seen[name] * 0.6180339887 % 1 < 1 / every else left).append(item)
        seen[name] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)
