"""OpenVINO GenAI's side of compare_cpu.py, run by a Python that has it; `worker.py` has the rest.

A converted model is a folder as optimum-intel writes it, with "converted.json" beside: its number
of parameters. Where there is none yet it is made here.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from worker import require_tokens, serve

BITS = {"int8": 8, "int4-g128": 4}
CACHE_BLOCK = 16  # tokens; its blocks hold no fewer


class OpenvinoWorker:
    """One model in OpenVINO GenAI's pipeline with continuous batching, as it serves requests.

    path: the model in Hugging Face's form. converted: the folder with OpenVINO's form of it, made
    if it is not there. form: "bf16", "int8" (a scale an output) or "int4-g128". longest: tokens of
    the longest sequence. most, most_tokens: sequences, and tokens of all of them, at once.
    """

    def __init__(
        self,
        path: str,
        converted: str,
        form: str,
        threads: int,
        load_format: str,
        longest: int,
        most: int,
        most_tokens: int,
    ) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not Path(converted).is_dir():
            convert(Path(path), Path(converted), form, load_format)
        import openvino_genai

        self._genai = openvino_genai
        self.description = {
            "version": openvino_genai.__version__,
            **json.loads(Path(converted, "converted.json").read_text(encoding="utf-8")),
        }
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = max(2048, longest)
        scheduler.max_num_seqs = most
        # Room for all of them and for every last block; its default grows while it is measured.
        scheduler.num_kv_blocks = 2 * most + 2 * -(-most_tokens // CACHE_BLOCK)
        # A shape has no tokenizer; token ids go in and come out.
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            converted,
            openvino_genai.Tokenizer(converted),
            scheduler,
            "CPU",
            PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT="bf16",
        )

    def generate(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each prompt."""
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
        found = [len(result.m_generation_ids[0]) for result in results]
        require_tokens("OpenVINO", found, count)
        return seconds


def convert(path: Path, converted: Path, form: str, load_format: str) -> None:
    """Write OpenVINO's form of a model by optimum-intel; made whole or not at all.

    load_format "dummy": random weights in the shape that `path`'s config.json tells.
    """
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    options: dict[str, Any] = {"load_in_8bit": False}
    if form in BITS:
        sizes: dict[str, Any] = {"bits": BITS[form], "sym": True}
        if form.startswith("int4"):
            # A width that 128 does not divide takes smaller groups, as in octavo.
            sizes |= {"group_size": 128, "ratio": 1.0, "group_size_fallback": "adjust"}
        options = {"quantization_config": OVWeightQuantizationConfig(**sizes)}
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        source = Path(temporary, "source")
        num_parameters = write_source(path, source, load_format)
        unfinished = Path(temporary, "converted")
        model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **options)
        model.save_pretrained(unfinished)
        text = json.dumps({"num_parameters": num_parameters})
        (unfinished / "converted.json").write_text(text + "\n", encoding="utf-8")
        unfinished.rename(converted)


def write_source(path: Path, source: Path, load_format: str) -> int:
    """Write the model in bf16 in Hugging Face's form, for the converter; returns its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if load_format != "dummy":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        config = AutoConfig.from_pretrained(path)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.tie_weights()  # part of what was left out
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-0.03, 0.03)
    model.save_pretrained(source)
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    serve(OpenvinoWorker)
