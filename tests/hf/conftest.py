"""What tests beside Hugging Face share: SmolLM2 as transformers runs it, loaded once a process."""

from __future__ import annotations

import pytest
from reference_helpers import SMOLLM2_MISSING, smollm2_path

from hf.hf_smollm2 import SmolLM2


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    path = smollm2_path()
    if path is None:
        pytest.skip(SMOLLM2_MISSING)
    return SmolLM2(path)
