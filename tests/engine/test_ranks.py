"""A model divided among ranks computes what the whole model does, and keeps the engine's promises.

Sums over all heads, or over the MLP's width, are those of the ranks' parts: they are rounded in
another order than in one process, and so differ from its sums by rounding.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from quantization_helpers import SCHEMES, write_family_model, write_float_model
from rank_helpers import DIVISIBLE, LIMITS, load_llm, load_session, logits_of, numbers, processes_of
from weights_helpers import write_gguf

from octavo import _native
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.quantize.writer import quantize_directory
from octavo.runtime.ranks import RankedRuntime
from octavo.sampling_params import SamplingParams

# Of logits near 4: float32 sums of some hundred numbers in another order, through two layers.
ROUNDING = 3e-6
# Where activations are rounded to 16 or 8 bits, their scale is that of the inputs that a rank has:
# half a step of 2^-15 or 2^-7, and of these most sums see several.
STEPS_OF_16, STEPS_OF_8 = 1e-3, 0.1

FLOATS: dict[str, dict[str, Any]] = {
    "odd vocabulary": {},
    "tied": {"vocab_size": 68, "tie_word_embeddings": True},
    "biases": {"vocab_size": 68, "attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
}


def compare(path: Path, tolerance: float, **options: Any) -> np.ndarray:
    one = logits_of(load_session(path, 1, **options))
    two = logits_of(load_session(path, 2, **options))
    assert np.ptp(one, axis=1).min() > 0.5
    assert np.abs(one - two).max() < tolerance
    return two


@pytest.mark.parametrize("case", FLOATS)
def test_logits_are_those_of_one_process(tmp_path: Path, case: str) -> None:
    path = write_float_model(tmp_path / "model", "F32", **FLOATS[case])
    compare(path, ROUNDING, dtype="f32")


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "qwen3_moe", "gemma2"])
def test_logits_of_families(tmp_path: Path, family: str) -> None:
    compare(write_family_model(tmp_path / family, family, "F32"), ROUNDING, dtype="f32")


def test_logits_of_four_ranks_that_share_kv_heads(tmp_path: Path) -> None:
    path = write_float_model(tmp_path / "model", "F32", **DIVISIBLE)
    one, four = (logits_of(load_session(path, ranks, dtype="f32")) for ranks in (1, 4))
    assert np.abs(one - four).max() < ROUNDING


@pytest.mark.parametrize("quantize", ["int8", "w8a8", "int4"])
def test_logits_of_weights_rounded_at_load(tmp_path: Path, quantize: str) -> None:
    path = write_float_model(tmp_path / "model", "F32", **DIVISIBLE)
    compare(path, STEPS_OF_8 if quantize == "w8a8" else STEPS_OF_16, quantize=quantize)


@pytest.mark.parametrize("scheme", ["int8", "int4-asymmetric", "int4-mixed"])
def test_logits_of_codes(tmp_path: Path, scheme: str) -> None:
    source = write_float_model(tmp_path / "float", "F32", **DIVISIBLE)
    quantize_directory(source, tmp_path / scheme, SCHEMES[scheme])
    compare(tmp_path / scheme, STEPS_OF_16, dtype="f32")


def test_logits_of_a_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind="Q4_K")
    compare(tmp_path / "model.gguf", STEPS_OF_16, dtype="f32")


# ---- GPUs: emulated ones, or two ----

needs_two_gpus = pytest.mark.skipif(
    DEVICE == "cuda" and _native.build_info()["num_devices"] < 2, reason="there are no two GPUs"
)


@needs_cuda
@needs_two_gpus
@pytest.mark.parametrize("options", [{"deterministic": True}, {"enforce_eager": True}, {}], ids=str)
def test_logits_on_a_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    """Sums in bfloat16, of activations near 1: a part is rounded to 2^-9 of it."""
    path = write_float_model(tmp_path / "model", vocab_size=68, attention_bias=True)
    compare(path, 0.08, device=DEVICE, **options)


@needs_cuda
@needs_two_gpus
@pytest.mark.parametrize("overlap", [False, True])
def test_answers_on_a_gpu_have_the_same_bits_in_any_batch(tmp_path: Path, overlap: bool) -> None:
    path = write_float_model(tmp_path / "model", vocab_size=68)
    llm = load_llm(path, 2, device=DEVICE, deterministic=True, overlap_steps=overlap)
    check_invariance(llm, LONG[:2])


@needs_cuda
@needs_two_gpus
def test_a_step_with_taps_has_the_same_shape_on_every_gpu(tmp_path: Path) -> None:
    """Others are padded to one that can be recorded: the ranks would exchange other numbers."""
    path = write_float_model(tmp_path / "model", vocab_size=68)
    session = load_session(path, 2, device=DEVICE, deterministic=True)
    session.restart(3)
    found = []
    for taps in ((), ("final_norm",), ("final_norm",), ()):
        session.rewind(0)
        found.append(session.step({0: [3], 1: [4], 2: [5]}, taps=taps).logits.tobytes())
    assert len(set(found)) == 1


# ---- mistakes ----

MISTAKES = {
    "a part of another rank": """
        import octavo.models.shards as module
        def shards(spec, part, rank, size, original=module.shards):
            other = original(spec, part, 1 - rank, size)
            found = original(spec, part, rank, size)
            return {**found, "layers.1.up.weight": other["layers.1.up.weight"]}
        """,
    "wrong columns of a matrix": """
        import octavo.models.shards as module
        def shards(spec, part, rank, size, original=module.shards):
            found = original(spec, part, rank, size)
            name = "layers.0.o.weight"
            return {**found, name: original(spec, part, 1 - rank, size)[name]}
        """,
    "the vocabulary in another order": """
        import octavo.models.shards as module
        def shards(spec, part, rank, size, original=module.shards):
            found, name = original(spec, part, rank, size), "lm_head.weight"
            return {**found, name: original(spec, part, 1 - rank, size)[name]}
        """,
    "both ranks add the bias": """
        import octavo.weights.shards as module
        class Source(module._ShardSource):
            def read_rows(self, name, first, last):
                tensor = super().read_rows(name, first, last)
                if name == "layers.0.o.bias":  # that of rank 0 is the only one that counts
                    return module.Tensor(tensor.data * 2, tensor.dtype)
                return tensor
        module._ShardSource = Source
        """,
}
PLANTED = """
import sys
from pathlib import Path
import numpy as np
from rank_helpers import load_session, logits_of
{mistake}
import octavo.runtime.loader as loader
if "shards" in vars():
    loader.shards = shards
path = Path(sys.argv[1])
one, two = (logits_of(load_session(path, ranks, dtype="f32")) for ranks in (1, 2))
print(np.abs(one - two).max())
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_is_noticed(tmp_path: Path, mistake: str) -> None:
    """It is planted in rank 0; the other one is right."""
    changes = {**DIVISIBLE, "attention_bias": True}
    path = write_float_model(tmp_path / "model", "F32", **changes)
    lines = [line.removeprefix(" " * 8) for line in MISTAKES[mistake].splitlines()]
    program = PLANTED.format(mistake="\n".join(lines))
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 1000 * ROUNDING


# ---- the promise: a request's bits do not depend on what else is computed ----

LONG = [[(i * i * (3 + s) + s) % 67 for i in range(n)] for s, n in enumerate((40, 3, 21, 33, 17))]
SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=16, logprobs=3, ignore_eos=True)
GREEDY = replace(SAMPLED, temperature=0.0)


def check_invariance(llm: LLM, prompts: list[list[int]]) -> None:
    for params in (SAMPLED, GREEDY):
        alone = [llm.generate([prompt], params, progress=False)[0] for prompt in prompts]
        together = llm.generate(prompts, params, progress=False)
        assert numbers(together) == numbers(alone)
        if params.temperature:  # greedy answers of so small a model repeat themselves
            assert len({answer[0] for answer in numbers(alone)}) == len(prompts)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float_model(tmp_path_factory.mktemp("model") / "float", "F32", **DIVISIBLE)


@pytest.fixture(scope="module")
def pair(path: Path) -> Iterator[tuple[LLM, LLM]]:
    """The same model in one process, and divided between two."""
    one, two = (load_llm(path, ranks, dtype="f32") for ranks in (1, 2))
    yield one, two
    processes = processes_of(two)
    two.close()
    assert [process.wait(10) for process in processes] == [0]


def test_bits_are_the_same_alone_among_others_and_after_a_prefix_hit(pair: tuple[LLM, LLM]) -> None:
    check_invariance(pair[1], LONG)
    again = pair[1].generate([LONG[0]], GREEDY, progress=False)[0]
    assert again.metrics.num_cached_tokens >= 32


def test_bits_are_the_same_in_chunks_and_after_preemption(
    path: Path, pair: tuple[LLM, LLM]
) -> None:
    expected = numbers(pair[1].generate(LONG, SAMPLED, progress=False))
    small = load_llm(path, 2, dtype="f32", max_num_batched_tokens=7, num_kv_blocks=5)
    found = small.generate(LONG, SAMPLED, progress=False)
    assert numbers(found) == expected
    assert sum(output.metrics.num_preemptions for output in found) > 0


def test_a_wrong_bit_is_noticed(pair: tuple[LLM, LLM]) -> None:
    """Another number of ranks has other bits, and the same tokens."""
    one, two = (llm.generate(LONG, GREEDY, progress=False) for llm in pair)
    assert numbers(one) != numbers(two)
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in two]


def test_taps_of_what_every_rank_has_whole(path: Path) -> None:
    taps = ("embed", "layers.0.attn_out", "layers.1.mlp_norm", "layers.1.out", "final_norm")
    one, two = (load_session(path, ranks).step({0: [3, 4, 9]}, taps=taps).taps for ranks in (1, 2))
    for name in taps:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("taps", [("final_norm", "layers.0.q"), ("*",)])
def test_taps_of_parts_are_refused(path: Path, taps: tuple[str, ...]) -> None:
    session = load_session(path, 2)
    message = rf"a part of {re.escape(taps[-1])}: expected taps that are whole"
    with pytest.raises(InvalidArgumentError, match=message):
        session.step({0: [3, 4]}, taps=taps)
    assert np.isfinite(logits_of(session)).all()


def test_memory_is_that_of_all_ranks(path: Path) -> None:
    one, two = (load_session(path, ranks, num_kv_blocks=9).loaded for ranks in (1, 2))
    assert two.runtime.kv_bytes_per_block() * 2 == one.runtime.kv_bytes_per_block()
    whole, parts = one.runtime.memory(), two.runtime.memory()
    assert parts["kv_cache"] == whole["kv_cache"]
    # Embedding and norms are there twice.
    assert whole["weights"] < parts["weights"] < 1.5 * whole["weights"]


def test_closing_ends_a_rank_that_waits_for_this_one(path: Path) -> None:
    """As when this one fails where the other does not: it is told a step that is not taken here."""
    session = load_session(path, 2)
    runtime, processes = session.loaded.runtime, processes_of(session.loaded)
    assert isinstance(runtime, RankedRuntime)
    team, told = runtime._team, []
    tell = team.tell

    def record(name: str, *arguments: Any) -> None:
        told.append((name, *arguments))
        tell(name, *arguments)

    team.tell = record  # type: ignore[method-assign]
    session.step({0: [3, 4]})
    (step,) = (each for each in told if each[0] == "submit")
    tell(*step)
    for ticket in range(8):  # those that there are not are of no account
        tell("wait", ticket)
    begin = time.monotonic()
    runtime.close()
    assert [process.wait(10) for process in processes] == [0]
    assert time.monotonic() - begin < 4


def test_the_engine_is_told_what_kind_of_batches_there_are(pair: tuple[LLM, LLM]) -> None:
    assert isinstance(pair[1].engine, Engine)
    assert pair[1].engine.options.world_size == 2
    assert LIMITS["max_num_seqs"] == pair[1].engine.options.max_num_seqs
