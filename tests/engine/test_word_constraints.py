"""Allowed tokens and bad words: what they forbid, and that other requests are not concerned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_helpers import fake_engine, run_to_end, solo_answer
from fake_runtime import draw
from reference_helpers import need_smollm2

from octavo.engine import word_constraints
from octavo.engine.constraints import all_allowed
from octavo.engine.request import Sequence
from octavo.engine.word_constraints import AllowedTokens, BadWords, tokens_of_words
from octavo.errors import InvalidArgumentError
from octavo.reference.sampling import unpack_masks
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

PLAIN = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def allowed_by(constraint: Any, vocab: int = 101) -> list[int]:
    masks = all_allowed(1, vocab)
    constraint.forbid(masks[0].view("uint32"))
    return np.flatnonzero(unpack_masks(masks, vocab)[0]).tolist()


def test_allowed_tokens() -> None:
    assert allowed_by(AllowedTokens((3, 64, 40))) == [3, 40, 64]
    assert allowed_by(AllowedTokens((31,))) == [31]
    assert allowed_by(AllowedTokens((100, 0))) == [0, 100]


def test_the_last_token_of_a_word_is_forbidden_after_the_others() -> None:
    sequence = Sequence("a", [5, 6], PLAIN)
    constraint = BadWords(sequence, [[9], [6, 7], [1, 2, 3]])
    assert constraint.watches_answer and not BadWords(sequence, [[9]]).watches_answer

    def forbidden(*answer: int) -> set[int]:
        sequence.token_ids[2:] = answer
        return set(range(101)) - set(allowed_by(constraint))

    assert forbidden() == {9}  # the 6 before it is the prompt's
    assert forbidden(6) == {9, 7}
    assert forbidden(1, 2) == {9, 3}
    assert forbidden(2) == forbidden(1, 2, 4) == {9}
    assert forbidden(1, 1, 2) == {9, 3}


class Spaced:
    """A tokenizer whose token for a letter is another one after a space."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [
            ord(text[i]) + 100 * (text[i - 1 : i] == " ")
            for i in range(len(text))
            if text[i] != " "
        ]


def test_words_as_they_are_and_after_a_space() -> None:
    tokenizer: Any = Spaced()
    assert tokens_of_words(["ab"], tokenizer) == [[97, 98], [197, 98]]
    assert tokens_of_words([" ab", "ab", "c"], tokenizer) == [[97, 98], [197, 98], [99], [199]]
    assert tokens_of_words([], None) == []
    with pytest.raises(InvalidArgumentError, match="bad_words is .*no tokenizer.*use logit_bias"):
        tokens_of_words(["x"], None)


def test_words_of_a_real_tokenizer() -> None:
    """Its tokens spell the word, alone and after a space; the last one is forbidden, no other."""
    tokenizer = Tokenizer(need_smollm2())
    for word in ("fox", "Schadenfreude", "New York", "é"):
        found = tokens_of_words([word], tokenizer)
        spelled = [b"".join(map(tokenizer.token_bytes, tokens)).decode() for tokens in found]
        assert spelled == [word, " " + word]
        sequence = Sequence("a", [5, *found[1]], PLAIN)  # a prompt may have it
        constraint = BadWords(sequence, found)
        single = {tokens[0] for tokens in found if len(tokens) == 1}
        every = set(range(tokenizer.vocab_size))
        assert every - set(allowed_by(constraint, tokenizer.vocab_size)) == single
        sequence.token_ids += found[1][:-1]
        forbidden = every - set(allowed_by(constraint, tokenizer.vocab_size))
        assert forbidden - single == ({found[1][-1]} if len(found[1]) > 1 else set())


WORDS = [[9], [17, 5], [2, 2, 40]]
FEW = (2, 5, 9, 17, 40, 41)


def expected_answer(prompt: list[int], params: SamplingParams) -> list[int]:
    """The fake model alone, with what is forbidden spelled out."""
    answer: list[int] = []
    for _ in range(params.max_tokens or 0):
        forbidden = set(range(97)) - set(FEW)
        for word in WORDS:
            if answer[len(answer) - len(word) + 1 :] == word[:-1] or len(word) == 1:
                forbidden.add(word[-1])
        sampling = (params.temperature, params.top_k, params.top_p, params.min_p)
        seed = params.seed or 0
        answer.append(draw([*prompt, *answer], sampling, seed, 0, frozenset(forbidden))[0])
    return answer


class OfThePrompt(BadWords):
    """Counts the prompt's tokens."""

    def forbid(self, words: Any) -> None:
        self._sequence.num_prompt_tokens, kept = 0, self._sequence.num_prompt_tokens
        super().forbid(words)
        self._sequence.num_prompt_tokens = kept


class First(BadWords):
    """Forbids a word's first token."""

    def __init__(self, sequence: Sequence, words: Any) -> None:
        super().__init__(sequence, [word[:1] for word in words])


class Early(BadWords):
    """Looks a token too far back."""

    def forbid(self, words: Any) -> None:
        last = self._sequence.token_ids.pop()
        super().forbid(words)
        self._sequence.token_ids.append(last)


class Shifted(AllowedTokens):
    def forbid(self, words: Any) -> None:
        self._words = np.left_shift(self._words, 1)
        super().forbid(words)
        self._words = np.right_shift(self._words, 1)


class Open(AllowedTokens):
    """Allows what lies beyond its last word."""

    def forbid(self, words: Any) -> None:
        beyond = words[len(self._words) :].copy()
        super().forbid(words)
        words[len(self._words) :] = beyond


PLANTED: dict[str, Any] = {
    "nothing": None,
    "BadWords": [OfThePrompt, First, Early],
    "AllowedTokens": [Shifted, Open],
}


@pytest.mark.parametrize(
    ("name", "planted"),
    [(name, each) for name, found in PLANTED.items() for each in found or [None]],
)
def test_planted_errors_are_seen(name: str, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.engine.tokens_of_words", lambda words, tokenizer: WORDS)
    if planted is not None:
        monkeypatch.setattr(word_constraints, name, planted)
    right = []
    for seed in range(6):
        params = SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=24,
            ignore_eos=True,
            bad_words=("x",),
            allowed_token_ids=FEW,
        )
        engine = fake_engine(num_blocks=60)
        engine.add_request("a", [4, 2, 2], params)
        found = list(run_to_end(engine)["a"].outputs[0].token_ids)
        right.append(found == expected_answer([4, 2, 2], params))
    assert all(right) if planted is None else not all(right)


@pytest.mark.parametrize("overlap", [False, True])
def test_through_the_engine_beside_others(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    plain = solo_answer([4, 9, 2], PLAIN).token_ids
    word = list(plain[3:5])  # what it would say
    made = lambda words, tokenizer: [word] if words else []  # noqa: E731
    monkeypatch.setattr("octavo.engine.engine.tokens_of_words", made)
    engine = fake_engine(num_blocks=60, overlap_steps=overlap)
    requests = {
        "plain": PLAIN,
        "bad": replace(PLAIN, bad_words=("x",)),
        "few": replace(PLAIN, allowed_token_ids=(3, 40, 41), temperature=1.0, seed=5),
    }
    for name, params in requests.items():
        engine.add_request(name, [4, 9, 2], params)
    outputs = run_to_end(engine)
    found = {name: outputs[name].outputs[0].token_ids for name in requests}
    assert found["plain"] == plain
    assert found["bad"][:4] == plain[:4] and found["bad"][4] != plain[4]
    pairs = list(zip(found["bad"], found["bad"][1:], strict=False))
    assert tuple(word) not in pairs
    assert set(found["few"]) <= {3, 40, 41} and len(set(found["few"])) > 1


def test_what_cannot_be_is_refused() -> None:
    for given, message in (
        ({"allowed_token_ids": []}, "allowed_token_ids is empty; expected at least one"),
        ({"allowed_token_ids": [-1]}, "an entry of allowed_token_ids is -1"),
        ({"bad_words": [3]}, "bad_words holds 3; expected strings"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            SamplingParams(**given)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="allowed_token_ids is 70000; expected 0 to"):
        fake_engine().add_request("a", [1], replace(PLAIN, allowed_token_ids=(70_000,)))


def test_words_become_tokens_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is checked, before it is added: no step waits for them, however many answers."""
    made: list[tuple[str, ...]] = []

    def tokens(words: tuple[str, ...], tokenizer: Any) -> list[list[int]]:
        made.append(words)
        return WORDS if words else []

    monkeypatch.setattr("octavo.engine.engine.tokens_of_words", tokens)
    engine = fake_engine(num_blocks=200)
    params = replace(PLAIN, bad_words=("x", "y"), n=5, temperature=1.0)
    engine.check_request([4, 9, 2], params)
    assert made == [("x", "y")]
    engine.add_request("a", [4, 9, 2], params)
    engine.add_request("b", [4, 9], replace(params, bad_words=("z",)))
    assert made == [("x", "y"), ("z",)]
