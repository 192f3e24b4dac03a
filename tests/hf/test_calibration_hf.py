"""Calibrated directories in transformers: AWQ's changed norms are read along with the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization_helpers import write_float_model
from text_helpers import CORPUS, byte_level_directory
from transformers import AutoModelForCausalLM

from octavo.models.layer import weight_shapes
from octavo.quantization.apply import dequantized
from octavo.quantization.plan import Scheme
from octavo.quantize.calibrate import calibrate
from octavo.quantize.calibration import Calibration
from octavo.quantize.writer import quantize_directory
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library, not of octavo
pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (Python 3.11)")


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_transformers_runs_a_calibrated_directory(tmp_path: Path, method: str) -> None:
    source = byte_level_directory(write_float_model(tmp_path / "float", vocab_size=421))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(CORPUS), encoding="utf-8")

    def work(files: Any, checkpoint: Any, formats: Any) -> Any:
        return calibrate(files, checkpoint, formats, Calibration(text, method, 8, 31))

    target = quantize_directory(source, tmp_path / "out", Scheme("int4"), calibrate=work).path
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = [3, 30, 7, 7, 21, 66, 1, 400]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    files = read_model(target)
    checkpoint = open_checkpoint(files)
    weights = {name: dequantized(checkpoint, name) for name in weight_shapes(files.spec)}
    ours = ReferenceModel(files.spec, weights).forward(ids)
    # transformers rounds the decoded weights to the type of their scales, bfloat16.
    assert np.abs(theirs - ours).max() < 0.05 * ours.std()
