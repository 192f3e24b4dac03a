"""octavo as a model of lm-eval, EleutherAI's evaluation harness: its tasks without a server.

    python -m octavo.eval.lm_eval run --model octavo \
        --model_args pretrained=smollm2-135m,max_model_len=1024 --tasks arc_easy

runs lm-eval's own command with the model "octavo" in it; in a program, importing this module is
enough. It needs lm-eval (`pip install lm-eval`); nothing else in octavo does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

_MISSING: ImportError | None = None
try:
    import lm_eval.models  # noqa: F401 (or lm-eval would know no model but this one)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as _error:
    _MISSING = _error
    TemplateLM = object

    def register_model(name: str) -> Any:
        """Stands in for lm-eval's."""
        return lambda model: model


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256


@register_model("octavo")
class OctavoLM(TemplateLM):  # type: ignore[misc]
    """A model in memory that answers lm-eval's three kinds of requests.

    pretrained: what `LLM` takes as its model. batch_size, max_batch_size and device are lm-eval's:
    octavo batches by itself, and of a device only "cpu" and "cuda" mean something to it. options:
    fields of `EngineConfig`. llm: a model that is loaded already, in place of `pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        llm: LLM | None = None,
        **options: Any,
    ) -> None:
        _need_lm_eval()
        super().__init__()
        if device is not None:
            options["device"] = device.split(":")[0]
        self.llm = LLM(pretrained, **options) if llm is None else llm
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise InvalidArgumentError(
                "this model's directory has no tokenizer; lm-eval needs one: put it beside the "
                "weights"
            )
        self._tokens = tokenizer
        names = [tokenizer.config.get(name) for name in ("bos_token", "eos_token")]
        texts = [name.get("content") if isinstance(name, dict) else name for name in names]
        self._bos, self._eos = (tokenizer.token_id(text) for text in texts)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._eos is None:
            return min(self.llm.engine.eos_token_ids)
        return int(self._eos)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        return self.eot_token_id if self._bos is None else int(self._bos)

    @property
    def max_length(self) -> int:
        """The most tokens that predict others: those of context and continuation, but the last."""
        return self.llm.max_model_len - 2

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return "octavo"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's chat template writes it."""
        prompt = self.llm.encode_chat(chat_history, add_generation_prompt=add_generation_prompt)
        return prompt.text or ""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; with a BOS token where the model has one and the text has none yet."""
        if add_special_tokens is None:
            bos = None if self._bos is None else self._tokens.token(self._bos)
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self._tokens.encode(string, add_special_tokens))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, in windows as wide as the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop string."""
        prompts, params = [], []
        for context, options in (request.args for request in requests):
            asked = _sampling_params(options)
            room = self.max_length - (asked.max_tokens or 0)
            prompts.append(self.tok_encode(context)[-max(room, 1) :])
            params.append(asked)
        outputs = self.llm.generate(prompts, params, progress=not disable_tqdm) if prompts else []
        texts = [output.text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (key, context, continuation): log-probability; whether greedy decoding gives it.

        Only continuations are scored, so that contexts in common are computed once and shared. What
        is too long loses the beginning of its context.
        """
        prompts = [(context + rest)[-self.max_length - 1 :] for _, context, rest in requests]
        starts = [
            len(prompt) - min(len(rest), len(prompt) - 1)
            for prompt, (_, _, rest) in zip(prompts, requests, strict=True)
        ]
        params = [
            SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start)
            for start in starts
        ]
        outputs = self.llm.generate(prompts, params, progress=not disable_tqdm) if prompts else []
        results = []
        for (key, _, _), output, start in zip(requests, outputs, starts, strict=True):
            entries = [entry for entry in (output.prompt_logprobs or ())[start:] if entry]
            total = sum(entry.logprob for entry in entries)
            is_greedy = all(entry.top_token_ids[0] == entry.token_id for entry in entries)
            results.append((total, is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results


def _sampling_params(options: dict[str, Any]) -> SamplingParams:
    """lm-eval's generation options as octavo's; greedy unless do_sample is true."""
    asked = dict(options)
    until = asked.pop("until", None) or ()
    lengths = [asked.pop(name, None) for name in _LENGTHS]
    most = next((length for length in lengths if length is not None), _DEFAULT_LENGTH)
    temperature = asked.pop("temperature", 0.0)
    is_greedy = asked.pop("do_sample", None) is False
    return SamplingParams(
        temperature=0.0 if is_greedy else temperature,
        max_tokens=int(most),
        stop=(until,) if isinstance(until, str) else tuple(until),
        **asked,
    )


def _need_lm_eval() -> None:
    if _MISSING is not None:
        raise InvalidArgumentError(
            f"octavo.eval.lm_eval needs lm-eval ({_MISSING}); install it with `pip install lm-eval`"
        ) from _MISSING


def main() -> None:
    """lm-eval's command, with octavo among its models."""
    _need_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
