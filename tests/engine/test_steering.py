"""Masks and penalties while two steps are in flight: the same answers, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
from engine_helpers import fake_engine, run_to_end, solo_answer
from fake_runtime import VOCAB, FakeRuntime
from runtime_helpers import VOCAB as TINY_VOCAB
from runtime_helpers import tiny_runtime

from octavo.config import RuntimeOptions
from octavo.engine import answer as answer_module
from octavo.engine.constraints import Constraint, UInt32, all_allowed, clear_bits
from octavo.engine.engine import Engine
from octavo.engine.request import Sequence
from octavo.sampling_params import SamplingParams

PLAIN = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class Alternating:
    """After an even token an odd one, and the other way round; fails after `last` tokens."""

    is_active = True
    watches_answer = True

    def __init__(self, sequence: Sequence, last: int = 10_000) -> None:
        self.sequence, self.last = sequence, last

    def forbid(self, words: UInt32) -> None:
        tokens = self.sequence.token_ids
        if self.sequence.num_output_tokens >= self.last:
            raise RuntimeError("broken on purpose")
        parity = tokens[-1] % 2
        clear_bits(words, [token for token in range(VOCAB) if token % 2 == parity])


Maker = Callable[[Sequence], list[Constraint]]


@pytest.fixture
def constrain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Maker], None]:
    """Give every new answer the constraints that a function makes for its sequence."""

    def install(maker: Maker) -> None:
        def create(sequence: Sequence, stop_token_ids: Collection[int]) -> list[Constraint]:
            return maker(sequence)

        monkeypatch.setattr(answer_module, "create_constraints", create)

    return install


def test_a_constraint_sees_every_token_before_it_decides(
    constrain: Callable[[Maker], None],
) -> None:
    constrain(lambda sequence: [Alternating(sequence)] if sequence.key[0] == "a" else [])
    found = []
    for overlap in (False, True):
        engine = fake_engine(num_blocks=40, overlap_steps=overlap)
        for name in "ab":
            engine.add_request(name, [4, 9, 2], PLAIN)
        outputs = run_to_end(engine)
        found.append([outputs[name].outputs[0].token_ids for name in "ab"])
        assert isinstance(engine.runtime, FakeRuntime)
        assert engine.runtime.max_in_flight == 1 + overlap
        assert not engine.runtime._open
    assert found[0] == found[1]
    steered, plain = found[1]
    assert [token % 2 for token in (2, *steered)] == [i % 2 for i in range(25)]
    assert plain == solo_answer([4, 9, 2], PLAIN).token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_a_constraint_that_fails_ends_its_own_request_alone(
    constrain: Callable[[Maker], None], overlap: bool
) -> None:
    constrain(lambda sequence: [Alternating(sequence, last=5)] if sequence.key[0] == "a" else [])
    engine = fake_engine(num_blocks=40, overlap_steps=overlap)
    for name in "ab":
        engine.add_request(name, [4, 9, 2], PLAIN)
    outputs = run_to_end(engine)
    assert outputs["a"].outputs[0].finish_reason == "error"
    assert len(outputs["a"].outputs[0].token_ids) == 5
    assert "'a'" in str(outputs["a"].error) and "broken on purpose" in str(outputs["a"].error)
    assert outputs["b"].outputs[0].token_ids == solo_answer([4, 9, 2], PLAIN).token_ids
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_forbidding_every_token_is_an_error(constrain: Callable[[Maker], None]) -> None:
    class Nothing(Alternating):
        def forbid(self, words: UInt32) -> None:
            clear_bits(words, range(VOCAB))

    constrain(lambda sequence: [Nothing(sequence)])
    engine = fake_engine()
    engine.add_request("a", [4, 9, 2], PLAIN)
    assert "forbid every token" in str(run_to_end(engine)["a"].error)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97])
def test_masks_hold_the_tokens_that_exist(vocab_size: int) -> None:
    bits = [int(word) for word in all_allowed(2, vocab_size).view("uint32")[1]]
    assert sum(word.bit_count() for word in bits) == vocab_size


def test_penalties_while_two_steps_are_in_flight() -> None:
    params = replace(PLAIN, repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=3)
    found = []
    for overlap in (False, True):
        options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 2, overlap_steps=overlap)
        runtime = tiny_runtime(num_blocks=32)
        engine = Engine(runtime, options, num_kv_blocks=32, vocab_size=TINY_VOCAB)
        engine.add_request("a", [5, 17, 80, 2, 2, 41, 9], params)
        engine.add_request("b", [80, 80, 3], replace(PLAIN, temperature=0.7, seed=3))
        outputs = run_to_end(engine)
        found.append([outputs[name].outputs[0].token_ids for name in "ab"])
    assert found[0] == found[1]
    assert len(set(found[0][0])) > 8  # the penalties did something
