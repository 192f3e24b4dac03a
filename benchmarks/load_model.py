"""Seconds and memory that loading takes: quantized directories and GGUF files, disk cache warm.

    python benchmarks/load_model.py FOLDER              # Llama-3.2-1B's shape, random weights
    python benchmarks/load_model.py FOLDER --shape benchmarks/shapes/qwen2.5-0.5b --forms int8,q4_0

FOLDER keeps the files. A load is `LLM(...)` in a process of its own, behind the imports. Aims: less
than 3 seconds, and at most 1.15 times the weights as stored and the KV cache together. The memory
is the most that is resident, pages of mapped files included, less what the process took before.
The gate: every load of a form gives the same greedy tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, add_common, header, make_parser, write_json
from systems import Process, Row

from octavo import LLM
from octavo.machine import resident_memory
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

SHAPE = ROOT / "benchmarks" / "shapes" / "llama-3.2-1b"
DIRECTORIES = ("bf16", "int8", "int4")  # forms as Hugging Face stores them; the others are GGUF
FORMS = (*DIRECTORIES, "q8_0", "q4_0", "q4_k_m")
BLOCK = 16  # tokens of a block of the KV cache
SECONDS, MEMORY = 3.0, 1.15  # the aims


class Loaded:
    """A model loaded once, and what that took."""

    def __init__(self, path: str, threads: int, tokens: int) -> None:
        before = resident_memory()
        start = time.perf_counter()
        self._llm = LLM(
            path,
            dtype="bf16",
            num_threads=threads,
            max_model_len=tokens,
            num_kv_blocks=-(-tokens // BLOCK),
            block_size=BLOCK,
        )
        self._seconds, after = time.perf_counter() - start, resident_memory()
        if before is None or after is None:
            raise RuntimeError("the system does not tell what is resident; expected Linux")
        self._bytes = after.peak - before.now

    def figures(self) -> dict[str, Any]:
        """Seconds, bytes, and 8 greedy tokens."""
        from octavo import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        prompt = Row("prefill", 24, 1).prompts()[0]
        answer = self._llm.generate(prompt, params, progress=False)[0].outputs[0]
        return {"seconds": self._seconds, "bytes": self._bytes, "tokens": list(answer.token_ids)}


def prepare(shape: Path, folder: Path, form: str) -> Path:
    """The model in a form, made where it is not there."""
    from write_gguf import write_gguf
    from write_model import write_model

    source = folder / "bf16"
    if not source.is_dir():
        write_model(shape, source)
    path = folder / (form if form in DIRECTORIES else f"{form}.gguf")
    if not path.exists():
        print(f"writing {path.name}", file=sys.stderr, flush=True)
        if form in DIRECTORIES:
            quantize_directory(source, path, Scheme(form, method="rtn"))
        else:
            files = read_model(source)
            unfinished = path.with_suffix(".part.gguf")
            write_gguf(unfinished, files, open_checkpoint(files), form)
            unfinished.rename(path)
    return path


def stored_bytes(path: Path) -> int:
    """Bytes of the weights' files."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def measure(path: Path, files: ModelFiles, a: Any) -> dict[str, Any]:
    """Load it once so that its files are in the disk cache, then `rounds` times."""
    found = []
    for _ in range(a.rounds + 1):
        system = Process("load_model.Loaded", path, a.threads, a.context)
        found.append(system.figures())
        system.close()
    if any(each["tokens"] != found[0]["tokens"] for each in found):
        sys.exit(f"error: {path.name} gives other tokens after another load: {found}")
    held = stored_bytes(path) + 2 * files.spec.kv_elements(-(-a.context // BLOCK) * BLOCK)
    seconds = [each["seconds"] for each in found[1:]]
    memory = max(each["bytes"] for each in found[1:]) / held
    print(
        f"{path.name:10} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to "
        f"{max(seconds):.2f}; aim {SECONDS:g})   {memory:5.2f} of weights as stored + KV "
        f"({held / 2**20:,.0f} MiB; aim {MEMORY})"
    )
    return {"seconds": seconds, "memory": memory, "stored_and_kv": held, "loads": found}


def main() -> None:
    """Prepare, measure, print, and write JSON where asked to."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="keeps the models")
    add("--shape", type=Path, default=SHAPE, help="a folder with a config.json")
    add("--forms", default="int8,int4,q8_0,q4_0,q4_k_m", help=f"of: {', '.join(FORMS)}")
    add_common(parser)
    add("--context", type=int, default=4096, help="tokens that the KV cache holds")
    add("-r", "--rounds", type=int, default=3)
    a = parser.parse_args()
    folder = a.folder / a.shape.name
    folder.mkdir(parents=True, exist_ok=True)
    files = read_model(a.shape)
    forms = [form for form in a.forms.split(",") if form in FORMS]
    found = {form: measure(prepare(a.shape, folder, form), files, a) for form in forms}
    write_json(a.output, {**header("load_model", a), "model": a.shape.name, "forms": found})


if __name__ == "__main__":
    main()
