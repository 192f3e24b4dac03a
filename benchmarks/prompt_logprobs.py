"""What do the log-probabilities of a prompt cost, over a prefill with the head on every row?

One prompt, in turns: prefill with the logits of every token (and the largest of each row), which is
what any log-probability needs; the same prompt through `LLM.generate` with prompt_logprobs; and a
plain prefill, with the logits of the last token alone. Both of the first use the same rows a step.
The log-probabilities must be those of the logits.

    python benchmarks/prompt_logprobs.py [MODEL] [--tokens 2000] [--rounds 7] [--top 1]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
from common import in_turns, make_parser, median_ratio

from octavo import LLM, EngineConfig, SamplingParams
from octavo.config import read_environment
from octavo.reference.sampling import log_softmax
from octavo.runtime.loader import load_runtime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model

PREFILL, SCORED, PLAIN = "head on every row", "prompt_logprobs", "plain prefill"


class Runs:
    """One prompt, computed in the three ways."""

    def __init__(self, model: str, num_tokens: int, top: int, config: EngineConfig) -> None:
        self.llm = LLM(model, config=replace(config, enable_prefix_caching=False))
        limits = self.llm.engine.scheduler.limits
        self._chunk = min(limits.max_prompt_rows, limits.max_num_batched_tokens)
        environment = read_environment()
        files = read_model(resolve_model(model, environment))
        checkpoint = open_checkpoint(files, config.load_format, config.seed)
        alone = replace(config, max_num_seqs=1, max_num_batched_tokens=self._chunk)
        self._session = Session(load_runtime(files, checkpoint, alone, None, environment))
        vocab = files.spec.vocab_size
        self.prompt = [(7919 * i + i * i) % vocab for i in range(num_tokens)]
        self._scored = SamplingParams(max_tokens=1, prompt_logprobs=top, temperature=0)
        self._plain = SamplingParams(max_tokens=1, temperature=0)

    def seconds(self, name: str) -> float:
        start = time.perf_counter()
        if name == PREFILL:
            self._session.rewind(0)
            for tokens in self._chunks():
                ticket = self._session.submit({0: tokens}, range(len(tokens)))
                self._session.loaded.runtime.wait(ticket)
        else:
            params = self._scored if name == SCORED else self._plain
            self.llm.generate(self.prompt, params, progress=False)
        return time.perf_counter() - start

    def check(self) -> float:
        """The largest difference to the log-probabilities of the session's logits."""
        (output,) = self.llm.generate(self.prompt, self._scored, progress=False)
        entries = output.prompt_logprobs or ()
        self._session.rewind(0)
        worst, place = 0.0, 0
        for tokens in self._chunks():
            logits = self._session.step({0: tokens}, range(len(tokens))).logits
            for row in log_softmax(logits):
                place += 1
                entry = entries[place] if place < len(entries) else None
                if entry is not None:
                    worst = max(worst, abs(float(row[self.prompt[place]]) - entry.logprob))
        return worst if place == len(entries) else np.inf

    def _chunks(self) -> list[list[int]]:
        starts = range(0, len(self.prompt), self._chunk)
        return [self.prompt[start : start + self._chunk] for start in starts]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--top", type=int, default=1)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    config = EngineConfig(device=arguments.device, max_model_len=arguments.tokens + 16)
    runs = Runs(arguments.model, arguments.tokens, arguments.top, config)
    difference = runs.check()
    if not difference < 1e-4:
        raise SystemExit(f"the log-probabilities differ from those of the logits by {difference}")
    found: dict[str, list[float]] = {PREFILL: [], SCORED: [], PLAIN: []}
    for number in range(arguments.rounds + 1):
        for name in in_turns(found, number):
            seconds = runs.seconds(name)
            if number:  # the first round only warms up
                found[name].append(seconds)
    print(f"{arguments.tokens} tokens; log-probabilities within {difference:.1e} of the logits'")
    for name, seconds_of in found.items():
        speed = arguments.tokens / statistics.median(seconds_of)
        ratio = median_ratio(seconds_of, found[PREFILL])
        print(f"{name:18} {speed:9.0f} tokens/s  {ratio:.3f} of the time of the first")


if __name__ == "__main__":
    main()
