"""What does a wider beam find, and what does it take?

For a few passages of a book and several numbers of beams: the mean score of the best answer (its
log-probability over its length), the most blocks of the KV cache that were held, over those of one
sequence of that length, and how many tokens the beams computed together.

    python benchmarks/beam_search.py [MODEL] [--tokens 48] [--svg FILE]   the plot: octavo[plot]
"""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

from common import make_parser

from octavo import LLM, BeamSearchParams

WIDTHS = (1, 2, 4, 8, 16)
STARTS, LENGTH = (0, 3000, 9000, 15000), 900  # of the prompts, in characters of the text


class Found(NamedTuple):
    """Means over the prompts."""

    score: float
    blocks: float
    tokens: float


def measure(llm: LLM, width: int, max_tokens: int) -> Found:
    params = BeamSearchParams(width, max_tokens)
    engine = llm.engine
    text = resources.files("octavo.eval").joinpath("text.txt").read_text(encoding="utf-8")
    scores, blocks = [], []
    before = engine.num_sampled_tokens
    for start in STARTS:
        encoded = llm.encode_prompt(text[start : start + LENGTH])
        search = llm.make_search(params, len(encoded.token_ids))
        engine.add_request(str(start), encoded.token_ids, params.sampling_params(), search=search)
        most = 0
        output = None
        while engine.has_unfinished_requests:
            for chunk in engine.step():
                output = chunk.result or output
            most = max(most, engine.blocks.num_blocks - engine.blocks.num_free_blocks)
        if output is None:
            raise SystemExit("a search has no result")
        best = output.outputs[0]
        scores.append((best.cumulative_logprob or 0.0) / len(best.token_ids))
        length = len(encoded.token_ids) + max_tokens
        blocks.append(most / engine.blocks.groups.blocks_in_group(length))
    count = len(STARTS)
    tokens = (engine.num_sampled_tokens - before) / count
    return Found(sum(scores) / count, sum(blocks) / count, tokens)


def plot(found: dict[int, Found], path: str) -> None:
    """Write the score and the blocks over the number of beams, as an SVG."""
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure

    matplotlib.style.use("tableau-colorblind10")
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(found), [each.score for each in found.values()], "o-")
    left.set(xlabel="Beams", ylabel="Score of the best answer")
    right.plot(list(found), [each.blocks for each in found.values()], "s-", label="held")
    right.plot(list(found), list(found), "--", label="without sharing")
    right.set(xlabel="Beams", ylabel="Blocks of one sequence", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--svg")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, max_model_len=512, enable_prefix_caching=False)
    found = {width: measure(llm, width, arguments.tokens) for width in WIDTHS}
    print("beams  score of the best  blocks of one sequence  tokens a prompt")
    for width, each in found.items():
        print(f"{width:5} {each.score:18.3f} {each.blocks:23.2f} {each.tokens:16.0f}")
    if arguments.svg:
        plot(found, arguments.svg)


if __name__ == "__main__":
    main()
