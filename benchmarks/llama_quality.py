"""What llama.cpp's formats cost in quality, by its own tools, on the text that octavo eval reads.

    python benchmarks/llama_quality.py --llama-perplexity PATH --output FILE

Writes the model as float32 GGUF with its own tokens (write_gguf.py), makes each format of it with
the llama-quantize beside the binary, and compares each with the logits of the float32 file: windows
of 512 tokens without overlap, of which llama-perplexity scores the second halves.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from common import ROOT, add_common, make_parser, stamp, write_json
from systems import output_of
from write_gguf import write_gguf

from octavo.config import read_environment
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

TEXT = ROOT / "python" / "octavo" / "eval" / "text.txt"
FORMS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
# What llama-perplexity prints: a name, a colon, a number, and mostly its standard error.
_FIGURES = {
    "perplexity": r"Mean PPL\(Q\)\s*:",
    "perplexity_of_base": r"Mean PPL\(base\)\s*:",
    "perplexity_ratio": r"Mean PPL\(Q\)/PPL\(base\)\s*:",
    "mean_kl": r"Mean\s+KLD\s*:",
    "kl_99": r"99\.0%\s+KLD\s*:",
    "max_kl": r"Maximum KLD\s*:",
    "same_first_choice_percent": r"Same top p\s*:",
}


def figures(output: str) -> dict[str, float]:
    """The figures in what llama-perplexity --kl-divergence prints."""
    found = {}
    for name, pattern in _FIGURES.items():
        match = re.search(pattern + r"\s*([-+0-9.e]+)", output)
        if match is None:
            raise ValueError(f"llama-perplexity printed no {name}: {output[-500:]!r}")
        found[name] = float(match[1])
    return found


def main() -> None:
    """Compare every format, print a table, and write JSON where asked to."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="a name or folder, as octavo takes it")
    add("--llama-perplexity", type=Path, required=True, help="path of the binary")
    add("--vocabulary", default="smollm", help="llama.cpp's name for how the tokenizer splits text")
    add("--text", type=Path, default=TEXT)
    add_common(parser)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model, read_environment())
    files = read_model(path)
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, logits = folder / "f32.gguf", folder / "logits"
        write_gguf(base, files, open_checkpoint(files, "auto"), "f32", arguments.vocabulary)
        common = [str(arguments.llama_perplexity), "-f", str(arguments.text), "-c", "512"]
        common += ["-t", str(arguments.threads), "--kl-divergence-base", str(logits)]
        output_of([*common, "-m", str(base)])
        quantize = arguments.llama_perplexity.with_name("llama-quantize")
        for form in FORMS:
            file = folder / f"{form}.gguf"
            print(f"{form} …", file=sys.stderr, flush=True)
            output_of([str(quantize), str(base), str(file), form])
            found = figures("".join(output_of([*common, "-m", str(file), "--kl-divergence"])))
            result[form] = {**found, "file_bytes": float(file.stat().st_size)}
            file.unlink()
    print("| format | file, MiB | perplexity | ratio | mean KL | 99 % | same first choice |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for form, found in result.items():
        print(
            f"| {form} | {found['file_bytes'] / 2**20:.0f} | {found['perplexity']:.4f} "
            f"| {100 * (found['perplexity_ratio'] - 1):+.2f} % | {found['mean_kl']:.5f} "
            f"| {found['kl_99']:.4f} | {found['same_first_choice_percent']:.2f} % |"
        )
    stamped = {"benchmark": "llama_quality", "model": path.name, "text": arguments.text.name}
    machine = stamp(arguments.threads)
    write_json(arguments.output, {**stamped, "machine": machine, "against_float32": result})


if __name__ == "__main__":
    main()
