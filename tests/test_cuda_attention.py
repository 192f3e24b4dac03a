"""Attention on the CUDA backend, against the reference in float64."""

from __future__ import annotations

import pytest

from cuda_helpers import DEVICE, needs_cuda
from octavo import _native
from octavo.reference import ops
from ops_helpers import TOLERANCES, Case, attention_cases
from reference_helpers import max_error

pytestmark = needs_cuda


@pytest.mark.parametrize("case", list(attention_cases()), ids=str)
def test_attention_in_float32_equals_the_reference(case: Case) -> None:
    native = _native.Ops(DEVICE)
    for value, right in zip(case.native(native), case.reference(ops), strict=True):
        assert max_error(value, right) <= TOLERANCES[case.op]
