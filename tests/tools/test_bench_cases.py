"""What `octavo bench` says a case must read and compute: counted again, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runtime_helpers import tiny_spec

from octavo.bench.cases import (
    Case,
    Peak,
    Work,
    least_seconds,
    linear_weights,
    make_cases,
    streamed_bytes,
    work_of,
)
from octavo.errors import InvalidArgumentError
from octavo.models.spec import MoeSpec

SPEC = tiny_spec()  # 2 layers: hidden 36, 6 and 2 heads of 10, 44 wide; 83 tokens, tied


def test_cases_as_llama_bench_names_them() -> None:
    cases = make_cases([512, 0], [128], [1, 4], [0, 1024])
    assert [(case.name, case.batch, case.tokens) for case in cases] == [
        ("pp512", 1, 512),
        ("tg128", 1, 128),
        ("tg128", 4, 512),
        ("tg128 @ d1024", 1, 128),
        ("tg128 @ d1024", 4, 512),
    ]
    assert cases[-1].longest == 1152


@pytest.mark.parametrize(
    "arguments", [([0], [0], [1], [0]), ([8], [8], [0], [0]), ([-1], [8], [1], [0])]
)
def test_nothing_to_measure(arguments: tuple[list[int], ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        make_cases(*arguments)


def test_linear_weights() -> None:
    layer = 36 * (60 + 20 + 20) + 60 * 36 + 3 * 36 * 44
    assert linear_weights(SPEC) == 2 * layer


EXPERTS = tiny_spec(moe=MoeSpec(8, 2))


def test_a_token_is_multiplied_by_its_own_experts() -> None:
    layer = 36 * (60 + 20 + 20) + 60 * 36 + 2 * 3 * 36 * 44
    assert linear_weights(EXPERTS) == 2 * layer


def test_a_step_reads_the_experts_that_its_tokens_take() -> None:
    """Of 1,000 bytes 800 are experts'; of eight experts a token takes two."""

    def weight_bytes(case: Case) -> float:
        all_but = work_of(case, EXPERTS, 0.0, "f32", 4).num_bytes
        return work_of(case, EXPERTS, 1000.0, "f32", 4, 800.0).num_bytes - all_but

    assert weight_bytes(Case("decode", 5)) == pytest.approx(5 * (200 + 800 / 4))
    two = 1 - (6 / 8) ** 2  # a quarter each, if they choose apart
    assert weight_bytes(Case("decode", 1, batch=2)) == pytest.approx(200 + 800 * two)
    chunks = [1 - (6 / 8) ** count for count in (4, 4, 3)]
    expected = sum(200 + 800 * share for share in chunks)
    assert weight_bytes(Case("prefill", 11)) == pytest.approx(expected)


def test_an_untied_embedding_is_not_streamed() -> None:
    assert streamed_bytes(SPEC, 10_000, 2) == 10_000
    untied = replace(SPEC, tie_word_embeddings=False)
    assert streamed_bytes(untied, 20_000, 2) == 20_000 - 2 * 83 * 36


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
def test_the_work_of_decoding(window: int, kv_dtype: str) -> None:
    spec = tiny_spec(window=window)
    case = Case("decode", num_tokens=5, batch=3, depth=7)
    num_bytes, operations = 0.0, 0.0
    for step in range(5):
        num_bytes += 1000.0  # the weights, once for all sequences
        for _ in range(3):
            operations += 2 * (linear_weights(spec) + 83 * 36)
            seen = 7 + step + 1
            if window:
                seen = min(seen, window)
            for _layer in range(2):
                num_bytes += seen * 2 * 20 * {"f32": 4, "bf16": 2}[kv_dtype]
                operations += seen * 60 * 2 * 2
    assert work_of(case, spec, 1000.0, kv_dtype, 512) == Work(num_bytes, operations)


def test_the_work_of_an_embedding_model_has_no_head() -> None:
    assert streamed_bytes(SPEC, 10_000, 2, embeds=True) == 10_000 - 2 * 83 * 36
    prompt, text = (work_of(Case(kind, 9), SPEC, 1000.0, "f32", 4) for kind in ("prefill", "embed"))
    assert prompt.num_operations - text.num_operations == 2 * 83 * 36
    assert prompt.num_bytes == text.num_bytes


def test_the_work_of_a_prompt_in_chunks() -> None:
    case = Case("prefill", num_tokens=11)
    operations = 2.0 * (11 * linear_weights(SPEC) + 83 * 36)  # one row goes through the head
    operations += sum(2 * context * 60 * 2 * 2 for context in range(1, 12))
    num_bytes = 3 * 1000.0 + sum(2 * end * 2 * 20 * 4 for end in (4, 8, 11))
    assert work_of(case, SPEC, 1000.0, "f32", 4) == Work(num_bytes, operations)


def test_the_limit_is_the_slower_one() -> None:
    peak = Peak(bandwidth=10.0, flops=100.0)
    assert least_seconds(Work(50.0, 100.0), peak) == (5.0, "memory")
    assert least_seconds(Work(50.0, 900.0), peak) == (9.0, "arithmetic")
