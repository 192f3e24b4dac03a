"""How drafts are made: the option `speculative_config`, its parts named as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from octavo.draft_tree import MOST_NODES, Ranks, num_nodes, read_tree
from octavo.errors import InvalidArgumentError

METHODS = ("ngram", "draft_model", "layers", "medusa", "eagle")
_WITH_MODEL = ("draft_model", "medusa", "eagle")
_EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 5}'
MOST_TOKENS = 32
MOST_BRANCHES = 16


@dataclass(frozen=True)
class SpeculativeConfig:
    """Where drafts come from, and how many there are.

    method: "ngram" (what followed the last tokens earlier in prompt or answer), "draft_model"
        (another model with the same tokenizer), "layers" (the model's own first layers), "medusa"
        or "eagle" (heads trained for the model). Left out: "draft_model" where there is a model.
    model: the draft model, or the folder with the heads' safetensors.
    num_speculative_tokens: the most drafts of a chain in a step; 7 if left out. Seven and the token
        before them make eight, the most that a step recorded on a GPU has for each chain. With a
        tree: the number of its nodes.
    num_branches: the most chains of a sequence in a step. They form a tree, whose other chains have
        second and third guesses somewhere. 1: no tree.
    speculative_token_tree: a tree of a given shape, by its nodes: [[0], [1], [0, 0]], or as a text.
        [0] is the best guess of the next token, [1] the second best, [0, 0] the best after [0].
    prompt_lookup_min, prompt_lookup_max: how many tokens must agree for "ngram", and from how many
        on a longer match counts as no better.
    num_layers: for "layers".
    quantization: rounds a draft model's weights while it is loaded, as `EngineConfig.quantize`.
    adaptive: whether the number of drafts and branches follows the acceptance and the time of
        steps; False: there are always as many as allowed, if the method has so many.
    """

    method: str = ""
    model: str | None = None
    num_speculative_tokens: int | None = None
    num_branches: int = 1
    speculative_token_tree: Any = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    num_layers: int | None = None
    quantization: str | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not self.method and self.model is not None:
            object.__setattr__(self, "method", "draft_model")
        if self.method not in METHODS:
            raise _error("method", self.method, f"one of {', '.join(METHODS)}, as in {_EXAMPLE}")
        if not isinstance(self.adaptive, bool):
            raise _error("adaptive", self.adaptive, "true or false")
        self._read_tree()
        most = MOST_NODES if self.tree else MOST_TOKENS
        _check_range("num_speculative_tokens", self.num_speculative_tokens, 1, most)
        self._check_uses("model", _WITH_MODEL, needed=True)
        self._check_uses("num_layers", ("layers",), needed=True)
        self._check_uses("quantization", ("draft_model",))
        self._check_uses("prompt_lookup_min", ("ngram",))
        self._check_uses("prompt_lookup_max", ("ngram",))
        if self.num_layers is not None:
            _check_range("num_layers", self.num_layers, 1, 10_000)
        if self.method == "ngram":
            most = 4 if self.prompt_lookup_max is None else self.prompt_lookup_max
            _check_range("prompt_lookup_max", most, 1, 16)
            least = min(2, most) if self.prompt_lookup_min is None else self.prompt_lookup_min
            _check_range("prompt_lookup_min", least, 1, most)
            object.__setattr__(self, "prompt_lookup_max", most)
            object.__setattr__(self, "prompt_lookup_min", least)

    @property
    def tree(self) -> tuple[Ranks, ...]:
        """The chains of `speculative_token_tree`; none without it."""
        given = self.speculative_token_tree
        return () if given is None else read_tree(given, MOST_TOKENS)

    @property
    def most_chains(self) -> int:
        """The most chains of a sequence in a step."""
        return len(self.tree) or self.num_branches

    @property
    def depth(self) -> int:
        """The most drafts of a chain."""
        return max(map(len, self.tree), default=self.num_speculative_tokens or 7)

    def _read_tree(self) -> None:
        _check_range("num_branches", self.num_branches, 1, MOST_BRANCHES)
        given, chains = self.num_speculative_tokens, self.tree
        if not chains:
            object.__setattr__(self, "num_speculative_tokens", 7 if given is None else given)
            return
        if self.method == "ngram":
            raise InvalidArgumentError(
                "speculative_config has a speculative_token_tree, but method 'ngram' has other "
                "guesses for the first place alone: leave it out, and ask for num_branches"
            )
        if self.num_branches > 1:
            raise InvalidArgumentError(
                f"speculative_config has num_branches {self.num_branches} and a "
                f"speculative_token_tree, which says how many there are: leave one of them out"
            )
        if len(chains) > MOST_BRANCHES:
            raise _error(
                "speculative_token_tree",
                self.speculative_token_tree,
                f"at most {MOST_BRANCHES} leaves, not {len(chains)}",
            )
        nodes = num_nodes(chains)
        if given not in (None, nodes):
            raise _error(
                "num_speculative_tokens", given, f"{nodes}, the nodes of the tree, or none"
            )
        object.__setattr__(self, "num_speculative_tokens", nodes)

    def _check_uses(self, name: str, methods: tuple[str, ...], needed: bool = False) -> None:
        value = getattr(self, name)
        if value is not None and self.method not in methods:
            raise InvalidArgumentError(
                f"speculative_config has {name} {value!r}, but method {self.method!r} does not use "
                f"it; expected it with {' or '.join(methods)}: leave it out, or change the method"
            )
        if needed and value is None and self.method in methods:
            raise InvalidArgumentError(
                f"speculative_config has method {self.method!r} but no {name}: add it"
            )


def read_speculative_config(given: object) -> SpeculativeConfig | None:
    """A SpeculativeConfig as it is, or from a mapping or its JSON; None as it is.

    Raises InvalidArgumentError that names the part that is wrong.
    """
    if given is None or isinstance(given, SpeculativeConfig):
        return given
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise InvalidArgumentError(
                f"speculative_config is {given!r}, which is not JSON ({error}); expected an "
                f"object, as in {_EXAMPLE}"
            ) from None
    if not isinstance(given, Mapping):
        raise _error("", given, f"an object, as in {_EXAMPLE}")
    known = [field.name for field in fields(SpeculativeConfig)]
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise InvalidArgumentError(
            f"speculative_config has no {', '.join(unknown)}; expected some of {', '.join(known)}"
        )
    values: dict[str, Any] = {str(name): value for name, value in given.items()}
    for name in ("method", "model", "quantization"):
        if not isinstance(values.get(name, ""), str | None):
            raise _error(name, values[name], "a text")
    return SpeculativeConfig(**values)


def _error(name: str, value: object, expected: str) -> InvalidArgumentError:
    what = f"speculative_config's {name}" if name else "speculative_config"
    return InvalidArgumentError(f"{what} is {value!r}; expected {expected}")


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _error(name, value, f"an integer from {low} to {high}")
