"""What tests beside Hugging Face share: SmolLM2 as transformers runs it, loaded once a process."""

from __future__ import annotations

import pytest
from reference_helpers import need_smollm2

from hf.hf_smollm2 import SmolLM2


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    return SmolLM2(need_smollm2())
