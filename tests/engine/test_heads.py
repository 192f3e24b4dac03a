"""Medusa and EAGLE heads with random weights: what they draft, and that answers do not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from text_helpers import tiny_model

from octavo import LLM, SamplingParams
from octavo.draft_tree import MOST_RANKS, most_probable, read_tree
from octavo.engine.request import Sequence
from octavo.errors import InvalidArgumentError, UnsupportedModelError, WeightsError
from octavo.reference import ops
from octavo.speculation.eagle import EagleHead, EagleSource, TargetEnds
from octavo.speculation.medusa import MedusaHeads, MedusaSource
from octavo.speculation.speculator import Speculator
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

HIDDEN, VOCAB, INNER = 32, 512, 40
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cpu",
    "dtype": "f32",
    "num_threads": 1,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 24,
}
PROMPTS = ["a prompt of some length, in chunks of 24 tokens", "other words", "x y x y x y"]
RNG = np.random.default_rng(5)


def random(*shape: int) -> Any:
    return RNG.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("heads") / "tiny")


@pytest.fixture(scope="module")
def medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads; the second has two blocks."""
    tensors = {}
    for head, num_blocks in enumerate((1, 2, 1)):
        for block in range(num_blocks):
            tensors[f"{head}.{block}.linear.weight"] = random(HIDDEN, HIDDEN)
            tensors[f"{head}.{block}.linear.bias"] = random(HIDDEN)
        tensors[f"{head}.{num_blocks}.weight"] = random(VOCAB, HIDDEN)
    folder = tmp_path_factory.mktemp("medusa")
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


def eagle_tensors() -> dict[str, Any]:
    layer = "layers.0."
    return {
        "embed_tokens.weight": random(VOCAB, HIDDEN),
        "fc.weight": random(HIDDEN, 2 * HIDDEN),
        "fc.bias": random(HIDDEN),
        f"{layer}self_attn.q_proj.weight": random(32, HIDDEN),
        f"{layer}self_attn.k_proj.weight": random(16, HIDDEN),
        f"{layer}self_attn.v_proj.weight": random(16, HIDDEN),
        f"{layer}self_attn.o_proj.weight": random(HIDDEN, 32),
        f"{layer}mlp.gate_proj.weight": random(INNER, HIDDEN),
        f"{layer}mlp.up_proj.weight": random(INNER, HIDDEN),
        f"{layer}mlp.down_proj.weight": random(HIDDEN, INNER),
        f"{layer}post_attention_layernorm.weight": random(HIDDEN) + 1,
    }


def write_eagle(folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB},
        **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        **{"rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eagle(tmp_path_factory.mktemp("eagle") / "head", eagle_tensors())


SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"num_speculative_tokens": 4},
    "branches": {"num_speculative_tokens": 3, "num_branches": 3},
    "tree": {"speculative_token_tree": [[0], [1], [0, 0], [0, 1], [2], [1, 0], [0, 0, 0]]},
}


@pytest.mark.parametrize("method", ["medusa", "eagle"])
@pytest.mark.parametrize(
    ("shape", "temperature", "overlap"),
    [("chain", 0.0, True), ("chain", 0.8, False), ("branches", 0.0, False), ("tree", 0.8, True)],
)
def test_answers_stay_the_same(
    model: Path,
    request: pytest.FixtureRequest,
    method: str,
    shape: str,
    temperature: float,
    overlap: bool,
) -> None:
    config: dict[str, Any] = {"method": method, "model": str(request.getfixturevalue(method))}
    config |= {"adaptive": False, **SHAPES[shape]}
    params = SamplingParams(
        max_tokens=25, temperature=temperature, seed=3, ignore_eos=True, logprobs=2, n=2
    )
    plain = LLM(model, **OPTIONS).generate(PROMPTS, params, progress=False)
    llm = LLM(model, **OPTIONS, speculative_config=config, overlap_steps=overlap)
    found = llm.generate(PROMPTS, params, progress=False)
    assert [o.outputs for o in found] == [o.outputs for o in plain]
    again = llm.generate(PROMPTS, params, progress=False)  # prompts from the prefix cache
    assert [o.outputs for o in again] == [o.outputs for o in plain]
    assert llm.engine.stats().num_draft_tokens > 100
    assert (llm.engine.stats().num_draft_branches > 40) == (shape != "chain")
    scored = replace(params, prompt_logprobs=1)  # rows of prompts beside those with drafts
    both = [params, scored, params]
    found = llm.generate(PROMPTS, both, progress=False)
    assert [o.outputs for o in found] == [o.outputs for o in plain]
    small = LLM(model, **OPTIONS, speculative_config=config, num_kv_blocks=17)  # preempts
    found = small.generate([text * 3 for text in PROMPTS], params, progress=False)
    wide = LLM(model, **OPTIONS)
    expected = wide.generate([text * 3 for text in PROMPTS], params, progress=False)
    assert [o.outputs for o in found] == [o.outputs for o in expected]


class Watched(Speculator):
    """Keeps every draft with the tokens that it followed."""

    def __init__(self, source: Any, depth: int, tree: Any = ()) -> None:
        super().__init__(source, depth, adaptive=False, tree=tree)
        self.seen: list[tuple[list[int], list[int]]] = []
        self.others: list[tuple[list[int], list[list[int]]]] = []
        self.cached: list[int] = []

    def propose(self, sequence: Any) -> Any:
        drafts = list(super().propose(sequence))
        if drafts:
            self.seen.append((list(sequence.token_ids), drafts))
            self.cached.append(sequence.num_cached_tokens)
        return drafts

    def branches(self, sequence: Any) -> Any:
        chains = super().branches(sequence)
        self.others.append((list(sequence.token_ids), [list(chain) for chain in chains]))
        return chains


def watched(
    model: Path, source: Any, prompts: list[str], tree: Any = (), *, twice: bool = False
) -> Watched:
    """What a source drafts while the prompts are answered together; twice: from the cache, too."""
    drafter = Watched(source, 3, tree)
    room = {**OPTIONS, "max_num_seqs": 15, "max_num_batched_tokens": 64} if tree else OPTIONS
    llm = LLM(model, **room, enable_prefix_caching=twice)
    engine = llm.engine
    engine.drafter = engine.scheduler.drafter = drafter
    engine._pipeline._states = {"states": source.states}
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    llm.generate(prompts, params, progress=False)
    if twice:
        drafter.seen, drafter.cached = [], []
        llm.generate(prompts, params, progress=False)
    assert len(drafter.seen) > 20
    return drafter


def states_of(model: Path, token_ids: list[int]) -> Any:
    """The reference's hidden states behind the final norm, of all tokens."""
    from octavo.reference.llama import ReferenceModel

    files = read_model(model)
    weights = {k: t.to_float32() for k, t in open_checkpoint(files, "dummy").items()}
    taps: dict[str, Any] = {}
    ReferenceModel(files.spec, weights).forward(np.array(token_ids), taps=taps)
    norm = files.spec.final_norm
    residual = taps[f"layers.{len(files.spec.layers) - 1}.out"]
    return ops.norm(residual, weights["final_norm.weight"], None, norm.eps, norm.kind)


def ends_of(model: Path) -> TargetEnds:
    files = read_model(model)
    return TargetEnds.read(files, open_checkpoint(files, "dummy"))


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def test_what_medusa_heads_draft(model: Path, medusa: Path) -> None:
    """The formula once more, from the reference's hidden states."""
    heads = MedusaHeads.read(medusa, HIDDEN, VOCAB)
    assert [len(blocks) for blocks in heads.blocks] == [1, 2, 1]
    for token_ids, drafts in watched(model, MedusaSource(heads), PROMPTS).seen[::5]:
        # The state that gave the last token.
        hidden = states_of(model, token_ids[:-1])[-1]
        for head, draft in enumerate(drafts):
            x = hidden.astype(np.float64)
            for weight, bias in heads.blocks[head]:
                x = x + silu(weight @ x + bias)
            logits = heads.heads[head] @ x
            assert logits[draft] > logits.max() - 1e-4


def eagle_by_hand(
    tensors: dict[str, Any], ends: TargetEnds, features: Any, tokens: Any, first: int = 0
) -> Any:
    """The layer for the last of the rows, row by row and head by head, in float64.

    first: the position of the first row.
    """
    w = {name.removeprefix("layers.0."): t.astype(np.float64) for name, t in tensors.items()}
    frequencies = np.array([10000.0 ** (-i / 4) for i in range(4)])

    def turned(x: Any, position: int) -> Any:
        angles = (first + position) * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        return np.hstack([x[:4] * cos - x[4:] * sin, x[4:] * cos + x[:4] * sin])

    rows = [
        w["fc.weight"] @ np.hstack([ends.embedding[token], feature]) + w["fc.bias"]
        for token, feature in zip(tokens, features, strict=True)
    ]
    last, mixed = len(rows) - 1, []
    for head in range(4):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        q = turned((w["self_attn.q_proj.weight"] @ rows[last])[own], last)
        keys = [
            turned((w["self_attn.k_proj.weight"] @ row)[shared], position)
            for position, row in enumerate(rows)
        ]
        values = [(w["self_attn.v_proj.weight"] @ row)[shared] for row in rows]
        scores = np.array([q @ key for key in keys]) / 8**0.5
        weights = np.exp(scores - scores.max())
        mixed.append(sum(p * v for p, v in zip(weights / weights.sum(), values, strict=True)))
    x = rows[last] + w["self_attn.o_proj.weight"] @ np.hstack(mixed)
    normed = x / np.sqrt((x * x).mean() + 1e-5) * w["post_attention_layernorm.weight"]
    inner = silu(w["mlp.gate_proj.weight"] @ normed) * (w["mlp.up_proj.weight"] @ normed)
    return x + w["mlp.down_proj.weight"] @ inner


def test_what_an_eagle_head_drafts(model: Path, tmp_path: Path) -> None:
    """In chunks, after rejects, with what it kept: as if computed from the whole sequence anew."""
    tensors, ends = eagle_tensors(), ends_of(model)
    head = EagleHead.read(write_eagle(tmp_path / "head", tensors), ends)
    for token_ids, drafts in watched(model, EagleSource(head), PROMPTS).seen[::7]:
        features = list(states_of(model, token_ids[:-1]).astype(np.float64))
        tokens = token_ids[1:]
        for draft in drafts:
            made = eagle_by_hand(tensors, ends, features, tokens)
            logits = ends.head @ made
            assert logits[draft] > logits.max() - 1e-3
            features.append(made)
            tokens = [*tokens, draft]


def test_what_an_eagle_head_drafts_after_a_cached_prompt(model: Path, tmp_path: Path) -> None:
    """It sees the sequence from the first token on that was computed, at its true position."""
    tensors, ends = eagle_tensors(), ends_of(model)
    head = EagleHead.read(write_eagle(tmp_path / "head", tensors), ends)
    drafter = watched(model, EagleSource(head), PROMPTS, twice=True)
    assert max(drafter.cached) > 30
    found = list(zip(drafter.seen, drafter.cached, strict=True))
    for (token_ids, drafts), num_cached in [*found[:3], *found[3::9]]:
        features = list(states_of(model, token_ids[:-1]).astype(np.float64))[num_cached:]
        tokens = token_ids[num_cached + 1 :]
        made = eagle_by_hand(tensors, ends, features, tokens, num_cached)
        logits = ends.head @ made
        assert logits[drafts[0]] > logits.max() - 1e-3


def best_of(logits: Any, rank: int) -> int:
    return int(np.argsort(-logits, kind="stable")[rank])


def test_what_heads_draft_in_trees(model: Path, medusa: Path, tmp_path: Path) -> None:
    """Every draft of every chain is the guess of its rank, after the drafts before it."""
    tree = read_tree([[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0], [2]], 3)
    heads = MedusaHeads.read(medusa, HIDDEN, VOCAB)
    drafter = watched(model, MedusaSource(heads), PROMPTS, tree)
    assert len(drafter.others) == len(drafter.seen) > 10
    whole = [each for each in drafter.others if len(each[1]) == len(tree) - 1]
    assert len(whole) > 8
    for token_ids, chains in whole[::5]:
        hidden = states_of(model, token_ids[:-1])[-1]
        for path, chain in zip(tree[1:], chains, strict=True):
            expected = [best_of(heads.logits(hidden, i), rank) for i, rank in enumerate(path)]
            assert chain == expected[: len(chain)]
    tensors, ends = eagle_tensors(), ends_of(model)
    head = EagleHead.read(write_eagle(tmp_path / "head", tensors), ends)
    drafter = watched(model, EagleSource(head), PROMPTS, tree)
    whole = [each for each in drafter.others if len(each[1]) == len(tree) - 1]
    for token_ids, chains in whole[::9]:
        for path, chain in zip(tree[1:], chains, strict=True):
            features = list(states_of(model, token_ids[:-1]).astype(np.float64))
            tokens = token_ids[1:]
            for rank, draft in zip(path, chain, strict=True):
                made = eagle_by_hand(tensors, ends, features, tokens)
                assert draft == best_of(ends.head @ made, rank)
                features.append(made)
                tokens = [*tokens, draft]


def test_medusa_takes_the_most_probable_products(medusa: Path) -> None:
    heads = MedusaHeads.read(medusa, HIDDEN, VOCAB)
    source = MedusaSource(heads)
    sequence = Sequence("a", [1, 2, 3], SamplingParams(temperature=0.0))
    hidden = random(HIDDEN) * np.float32(9)
    source._hidden[sequence] = (3, hidden)
    chances = []
    for place in range(3):
        logits = heads.logits(hidden, place).astype(np.float64)
        weights = np.sort(np.exp(logits - logits.max()))[::-1]
        chances.append((weights / weights.sum())[:MOST_RANKS].tolist())
    expected = most_probable(chances, 4, 12)
    found = source.branches(sequence, None, 3, 3)
    assert list(found) == [chain for chain in expected if any(chain)] and len(found) >= 2


def test_a_planted_error_in_a_head_is_seen(model: Path, tmp_path: Path) -> None:
    """A position off by one in the EAGLE head's rope."""
    tensors, ends = eagle_tensors(), ends_of(model)
    head = EagleHead.read(write_eagle(tmp_path / "head", tensors), ends)
    features, tokens = random(6, HIDDEN), [3, 9, 2, 50, 7, 8]
    source = EagleSource(head)
    right = head.forward(features, tokens, source._empty(0))[-1]
    by_hand = eagle_by_hand(tensors, ends, features, tokens)
    assert np.abs(right - by_hand).max() < 1e-4
    cache = source._empty(0)
    head.forward(features[:5], tokens[:5], cache)
    cache.first = 1
    assert np.abs(head.forward(features[5:], tokens[5:], cache)[-1] - by_hand).max() > 1e-3


def test_heads_that_do_not_fit_are_refused(model: Path, medusa: Path, tmp_path: Path) -> None:
    def load(method: str, folder: Path) -> None:
        LLM(model, **OPTIONS, speculative_config={"method": method, "model": str(folder)})

    with pytest.raises(WeightsError, match="holds 0 safetensors files; expected one"):
        load("medusa", tmp_path)
    with pytest.raises(InvalidArgumentError, match="no model: add it"):
        LLM(model, **OPTIONS, speculative_config={"method": "medusa"})
    with pytest.raises(WeightsError, match=r"0\.0\.linear\.weight is of shape \(32, 32\); exp"):
        MedusaHeads.read(medusa, 48, VOCAB)
    with pytest.raises(WeightsError, match=r"0\.1\.weight is of shape \(512, 32\)"):
        MedusaHeads.read(medusa, HIDDEN, 77)
    save_file({"weight": random(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="holds no Medusa heads"):
        load("medusa", tmp_path)
    tensors = eagle_tensors()
    del tensors["layers.0.self_attn.k_proj.weight"]
    with pytest.raises(WeightsError, match=r"k_proj\.weight is missing; expected \(16, 32\)"):
        load("eagle", write_eagle(tmp_path / "missing", tensors))
    with pytest.raises(UnsupportedModelError, match="hidden_size 64; expected an EAGLE head of"):
        load("eagle", write_eagle(tmp_path / "wide", eagle_tensors(), hidden_size=64))
