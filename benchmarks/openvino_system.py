"""OpenVINO GenAI for compare_cpu.py, in a Python that has it.

A converted model is a folder as optimum-intel writes it, with "converted.json" beside: its number
of parameters. Where there is none yet it is made here (minutes).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from systems import Generating, Row, require_tokens

BITS = {"int8": 8, "int4-g128": 4}
CACHE_BLOCK = 16  # tokens; its blocks hold no fewer


class OpenVino(Generating):
    """One model in OpenVINO GenAI's pipeline with continuous batching, as it serves requests.

    path: the model in Hugging Face's form. folder: where OpenVINO's forms are kept. form: "bf16",
    "int8" (a scale an output) or "int4-g128". rows: all that will be asked for.
    """

    def __init__(
        self, path: str, folder: str, form: str, threads: int, load_format: str, rows: list[Row]
    ) -> None:
        converted = Path(folder, f"{Path(path).name}-{form}").absolute()
        most_tokens = max(row.requests * row.longest for row in rows)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not converted.is_dir():
            convert(Path(path), converted, form, load_format)
        import openvino_genai

        self._genai = openvino_genai
        self.description = {
            "version": openvino_genai.__version__,
            **json.loads((converted / "converted.json").read_text(encoding="utf-8")),
        }
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = max(2048, *(row.longest for row in rows))
        scheduler.max_num_seqs = max(row.requests for row in rows)
        # Room for all of them and for every last block; its default grows while it is measured.
        scheduler.num_kv_blocks = 2 * scheduler.max_num_seqs + 2 * -(-most_tokens // CACHE_BLOCK)
        # A shape has no tokenizer; token ids go in and come out.
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(converted),
            openvino_genai.Tokenizer(str(converted)),
            scheduler,
            "CPU",
            PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT="bf16",
        )

    def generate(self, prompts: list[list[int]], count: int) -> float:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = count
        config.set_eos_token_id(0)  # it wants to know one
        config.ignore_eos = True
        start = time.perf_counter()
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        seconds = time.perf_counter() - start
        require_tokens([len(result.m_generation_ids[0]) for result in results], count)
        return seconds


def convert(path: Path, converted: Path, form: str, load_format: str) -> None:
    """Write OpenVINO's form of a model by optimum-intel; made whole or not at all.

    load_format "dummy": random weights in the shape that `path`'s config.json tells.
    """
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers_system import load_model

    options: dict[str, Any] = {"load_in_8bit": False}
    if form in BITS:
        sizes: dict[str, Any] = {"bits": BITS[form], "sym": True}
        if form.startswith("int4"):
            # A width that 128 does not divide takes smaller groups, as in octavo.
            sizes |= {"group_size": 128, "ratio": 1.0, "group_size_fallback": "adjust"}
        options = {"quantization_config": OVWeightQuantizationConfig(**sizes)}
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        source, unfinished = Path(temporary, "source"), Path(temporary, "converted")
        model = load_model(path, torch.bfloat16, load_format)
        model.save_pretrained(source)
        text = json.dumps({"num_parameters": model.num_parameters()})
        del model
        converter = OVModelForCausalLM.from_pretrained(
            source, export=True, compile=False, **options
        )
        converter.save_pretrained(unfinished)
        (unfinished / "converted.json").write_text(text + "\n", encoding="utf-8")
        unfinished.rename(converted)
