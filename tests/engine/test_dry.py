"""DRY: the definition against a plain search, and the same answers through the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_helpers import run_to_end
from reference_helpers import need_smollm2
from runtime_helpers import VOCAB, make_batch, tiny_runtime

from octavo.config import RuntimeOptions
from octavo.engine import dry as dry_module
from octavo.engine.dry import Breakers, Dry
from octavo.engine.engine import Engine
from octavo.engine.request import Sequence
from octavo.reference import sampling
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

SETTINGS = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def oracle(tokens: list[int], breaks: set[int], allowed: int) -> dict[int, float]:
    """Every earlier place, compared with the end token by token."""
    longest: dict[int, int] = {}
    for place in range(1, len(tokens)):
        length = 0
        while (
            length < place
            and tokens[place - 1 - length] == tokens[len(tokens) - 1 - length]
            and not {place - 1 - length, len(tokens) - 1 - length} & breaks
        ):
            length += 1
        if length >= allowed and place not in breaks:
            longest[tokens[place]] = max(longest.get(tokens[place], 0), length)
    return {t: 0.8 * 1.75 ** (min(n, allowed + 60) - allowed) for t, n in longest.items()}


@pytest.mark.parametrize("seed", range(40))
def test_penalties_equal_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(0, 120))
    tokens = rng.integers(0, rng.choice([1, 2, 4, 9]), size).astype(np.int32)
    breaks = rng.random(size) < rng.choice([0, 0.05, 0.3])
    for allowed in (1, 2, 5):
        found = sampling.dry_penalties(
            tokens, breaks, multiplier=0.8, base=1.75, allowed_length=allowed
        )
        expected = oracle(tokens.tolist(), set(np.flatnonzero(breaks).tolist()), allowed)
        assert found[0].tolist() == sorted(expected)
        np.testing.assert_allclose(found[1], [expected[t] for t in sorted(expected)], 1e-6)


def test_the_example_of_its_author() -> None:
    """After "A B C D A B C" a D would be the fourth token of a repetition."""
    tokens = np.array([1, 2, 3, 4, 1, 2, 3], np.int32)
    none = np.zeros(7, np.bool_)
    found = sampling.dry_penalties(tokens, none, multiplier=0.8, base=1.75, allowed_length=2)
    assert found[0].tolist() == [4]
    assert found[1].tolist() == [np.float32(0.8 * 1.75)]
    assert not len(sampling.dry_penalties(tokens, none, multiplier=1, base=2, allowed_length=4)[0])


class Letters:
    """A tokenizer of a few pieces."""

    pieces = (b"a", b"b:", b"\n", b"x\ny", b"<", b"br>", b"b")

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def test_breakers_are_found_in_the_text() -> None:
    tokenizer: Any = Letters()
    breakers = Breakers(("\n", ":", "<br>"), tokenizer)
    order = [0, 1, 2, 3, 4, 5, 4, 6, 5, 4, 5]
    assert [breakers.push(token) for token in order] == [
        *(False, True, True, True, False, True, False, False, False, False, True)
    ]
    assert not any(Breakers(("\n",), None).push(token) for token in order)
    assert not any(Breakers((), tokenizer).push(token) for token in order)


def test_new_tokens_are_taken_up_and_the_range_is_kept() -> None:
    params = replace(GREEDY, dry_penalty_last_n=5, **SETTINGS)  # type: ignore[arg-type]
    sequence = Sequence("a", [1, 2, 3, 4, 1, 2], params)
    dry = Dry(sequence, None)
    assert dry.penalties()[0].tolist() == []  # the first 1 is out of range
    sequence.token_ids += [3, 1, 2]
    assert dry.penalties()[0].tolist() == [3]
    unlimited = Sequence("a", [1, 2, 3, 4, 1, 2], replace(params, dry_penalty_last_n=-1))
    assert Dry(unlimited, None).penalties()[0].tolist() == [3]
    off = Sequence("a", [1, 2, 3, 4, 1, 2], replace(params, dry_penalty_last_n=0))
    assert Dry(off, None).penalties()[0].tolist() == []


def expected_tokens(
    prompt: list[int], params: SamplingParams, breaker: int | None = None
) -> list[int]:
    """One token at a time, by the formula. breaker: a token that is a sequence breaker."""
    runtime = tiny_runtime()
    history = list(prompt)
    for _ in range(params.max_tokens or 0):
        ticket = runtime.submit(make_batch([(history, 0, [0, 1, 2])]))
        logits = runtime.logits(ticket)[0]
        runtime.wait(ticket)
        bias = dict(params.logit_bias)
        breaks = {i for i, token in enumerate(history) if token == breaker}
        for token, lost in oracle(history, breaks, params.dry_allowed_length).items():
            bias[token] = np.float32(bias.get(token, 0)) - np.float32(lost)
        for token, change in bias.items():
            logits[token] += np.float32(change)
        row = sampling.sampling_rows(
            1, temperature=params.temperature, seed=params.seed or 0, position=len(history)
        )[0]
        history.append(sampling.sample_row(logits, row))
    return history[len(prompt) :]


@pytest.mark.parametrize("overlap", [False, True])
def test_answers_equal_the_formula_in_any_batch(overlap: bool) -> None:
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 2, overlap_steps=overlap)
    engine = Engine(tiny_runtime(num_blocks=32), options, num_kv_blocks=32, vocab_size=VOCAB)
    prompt = [5, 17, 5, 17, 5, 17, 80]
    asked = {
        "plain": GREEDY,
        "dry": replace(GREEDY, **SETTINGS),  # type: ignore[arg-type]
        "warm": replace(GREEDY, temperature=0.3, seed=3, logit_bias={5: 3.0, 17: 3.0}, **SETTINGS),  # type: ignore[arg-type]
    }
    for name, params in asked.items():
        engine.add_request(name, prompt, params)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests:
        for chunk in engine.step():
            if chunk.result is not None:
                found[chunk.request_id] = list(chunk.result.outputs[0].token_ids)
    for name in ("dry", "warm"):
        assert found[name] == expected_tokens(prompt, asked[name])
    assert found["dry"] != found["plain"]


def _behind(self: Dry) -> None:
    """As `Dry._take_new_tokens`, a token late."""
    last = self._sequence.token_ids.pop()
    _take(self)
    self._sequence.token_ids.append(last)


def _of_the_answer(self: Dry) -> Any:
    tokens, lost = _penalties(self)
    is_new = np.isin(tokens, self._sequence.output_token_ids)
    return tokens[is_new], lost[is_new]


_take, _penalties = Dry._take_new_tokens, Dry.penalties
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "nothing": (Dry, "penalties", _penalties),
    "a token late": (Dry, "_take_new_tokens", _behind),
    "added": (Dry, "penalties", lambda self: (_penalties(self)[0], -_penalties(self)[1])),
    "of the answer alone": (Dry, "penalties", _of_the_answer),
    "one token longer": (
        dry_module,
        "dry_penalties",
        lambda *arrays, allowed_length, **options: sampling.dry_penalties(
            *arrays, allowed_length=allowed_length + 1, **options
        ),
    ),
    "over breaks": (Breakers, "push", lambda self, token: False),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [5, 17, 80, 5, 17, 80, 41, 5, 17, 80]
    bias = {5: 8.5, 17: 6.0, 80: 7.0, 41: 6.5}  # it would say nothing else
    params = replace(GREEDY, logit_bias=bias, **SETTINGS)  # type: ignore[arg-type]
    monkeypatch.setattr(Breakers, "push", lambda self, token: token == 41)
    monkeypatch.setattr(*PLANTED[name])
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 2)
    engine = Engine(tiny_runtime(num_blocks=32), options, num_kv_blocks=32, vocab_size=VOCAB)
    engine.add_request("a", prompt, params)
    found = list(run_to_end(engine)["a"].outputs[0].token_ids)
    assert (found == expected_tokens(prompt, params, breaker=41)) == (name == "nothing")


# ---- a real tokenizer ----


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(need_smollm2())


def test_breakers_in_a_real_tokenizer(tokenizer: Tokenizer) -> None:
    """A line's end breaks a repetition wherever it is: in a token of its own, or within one."""
    text = "one two three.\n\nSo: one two three."
    tokens = tokenizer.encode(text, add_special_tokens=False)
    breakers = Breakers(("\n", ":"), tokenizer)
    breaks = [breakers.push(token) for token in tokens]
    pieces = [tokenizer.token_bytes(token).decode() for token in tokens]
    assert "".join(pieces) == text
    assert breaks == ["\n" in piece or ":" in piece for piece in pieces] and sum(breaks) >= 2


def test_a_repetition_of_words_ends(tokenizer: Tokenizer) -> None:
    sequence = Sequence("a", [], replace(GREEDY, **SETTINGS))  # type: ignore[arg-type]
    again = "The quick brown fox jumps. The quick brown fox"
    sequence.token_ids = tokenizer.encode(again, add_special_tokens=False)
    tokens, lost = Dry(sequence, tokenizer).penalties()
    jumps = tokenizer.encode(" jumps", add_special_tokens=False)
    assert jumps[0] in tokens.tolist() and lost[tokens.tolist().index(jumps[0])] > 1.3
    broken = replace(sequence.params, dry_sequence_breakers=("fox",))
    other = Sequence("b", list(sequence.token_ids), broken)
    assert jumps[0] not in Dry(other, tokenizer).penalties()[0].tolist()
