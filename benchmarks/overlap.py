"""Does it pay to have the next step on its way while this one is computed?

The same requests with `overlap_steps` and without, in turns; tokens a second, the best and the
median of the rounds, and the median of their ratios. The answers must be the same.

    python benchmarks/overlap.py [MODEL] [--rounds 12] [--device auto]
"""

from __future__ import annotations

import statistics
import time

from common import in_turns, make_parser, median_ratio

from octavo import LLM, SamplingParams

CASES = ((1, 128), (16, 64), (64, 48))  # requests at a time, new tokens of each


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    llms = {
        overlap: LLM(
            arguments.model,
            device=arguments.device,
            max_model_len=512,
            overlap_steps=overlap,
            enable_prefix_caching=False,
        )
        for overlap in (False, True)
    }
    for num_requests, max_tokens in CASES:
        prompts = [[(977 * i + 31 * j) % 1000 for j in range(16)] for i in range(num_requests)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        speeds: dict[bool, list[float]] = {overlap: [] for overlap in llms}
        for number in range(arguments.rounds + 1):
            answers = []
            for overlap in in_turns(llms, number):
                start = time.perf_counter()
                outputs = llms[overlap].generate(prompts, params, progress=False)
                if number:  # the first round only warms up
                    seconds = time.perf_counter() - start
                    speeds[overlap].append(num_requests * max_tokens / seconds)
                answers.append([output.outputs for output in outputs])
            if answers[0] != answers[1]:
                raise SystemExit("the answers differ")
        line = "  ".join(
            f"{name} {max(found):8.1f} best {statistics.median(found):8.1f} median"
            for name, found in (("off", speeds[False]), ("on", speeds[True]))
        )
        ratio = median_ratio(speeds[True], speeds[False])
        print(f"{num_requests:3} requests: {line}  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
