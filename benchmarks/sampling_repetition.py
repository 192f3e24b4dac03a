"""How much answers repeat themselves, by the options of sampling.

Continues a few texts with SmolLM2-135M by 200 tokens each, and counts the sequences of four tokens
that the answer had already.
"""

from __future__ import annotations

from octavo import LLM, SamplingParams

TEXTS = (
    "The three laws of robotics are",
    "My favourite recipe begins with",
    "Dear diary, today",
    "The history of Portugal is",
    "To repair a bicycle, first",
    "Once upon a time there was a fox who",
    "The results of the experiment show",
    "def fibonacci(n):",
)
OPTIONS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "greedy, DRY 0.8": {"temperature": 0, "dry_multiplier": 0.8},
    "greedy, repetition penalty 1.1": {"temperature": 0, "repetition_penalty": 1.1},
    "temperature 1": {"temperature": 1},
    "temperature 1, top_p 0.9": {"temperature": 1, "top_p": 0.9},
    "temperature 1, typical_p 0.9": {"temperature": 1, "typical_p": 0.9},
    "temperature 1, top_n_sigma 1": {"temperature": 1, "top_n_sigma": 1},
    "temperature 1, min_p 0.05": {"temperature": 1, "min_p": 0.05},
    "the same, XTC 0.5": {"temperature": 1, "min_p": 0.05, "xtc_probability": 0.5},
}


def repeated(tokens: tuple[int, ...]) -> float:
    """The fraction of sequences of four tokens that came before."""
    fours = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(fours)) / len(fours)


def main() -> None:
    """Print a table in Markdown."""
    llm = LLM("smollm2-135m")
    print("| options | repeated | mean log-probability |\n|---|---|---|")
    for name, options in OPTIONS.items():
        params = SamplingParams(max_tokens=200, ignore_eos=True, seed=1, logprobs=0, **options)  # type: ignore[arg-type]
        answers = [output.outputs[0] for output in llm.generate(list(TEXTS), params)]
        rate = sum(repeated(answer.token_ids) for answer in answers) / len(answers)
        logprob = sum(answer.cumulative_logprob or 0.0 for answer in answers) / 200 / len(answers)
        print(f"| {name} | {rate:.0%} | {logprob:.2f} |", flush=True)


if __name__ == "__main__":
    main()
