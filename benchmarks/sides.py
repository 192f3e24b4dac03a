"""octavo and Hugging Face, each in a process of its own, answering the same questions.

A process of its own: neither library's threads spin while the other one is measured.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class OctavoSide:
    """octavo through its public API, engine and sampler included."""

    def __init__(self, path: Path, dtype: str, num_threads: int) -> None:
        from octavo import LLM

        # Every round asks the same prompt: it is to be computed each time.
        self._llm = LLM(
            path,
            dtype=dtype,
            num_threads=num_threads,
            max_model_len=2048,
            enable_prefix_caching=False,
        )

    def _run(self, prompt: list[int], num_tokens: int, logprobs: int | None = None) -> Any:
        from octavo import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs
        )
        return self._llm.generate(prompt, params, progress=False)[0]

    def decode(self, prompt: list[int], num_tokens: int) -> Answer:
        """Tokens a second after the first token, and the tokens."""
        output = self._run(prompt, num_tokens)
        return {"speed": output.metrics.tokens_per_second, "tokens": output.outputs[0].token_ids}

    def prefill(self, prompt: list[int]) -> Answer:
        """Prompt tokens a second, up to the first token of the answer."""
        return {"speed": len(prompt) / self._run(prompt, 1).metrics.time_to_first_token}

    def logprobs(self, prompt: list[int]) -> Answer:
        """The 20 most probable next tokens and their log-probabilities."""
        first = self._run(prompt, 1, logprobs=20).outputs[0].logprobs[0]
        return dict(zip(first.top_token_ids, first.top_logprobs, strict=True))


class HuggingFaceSide:
    """transformers in eager mode: a plain loop over the model with its cache.

    The loop is faster than `model.generate`, which does the same and more around it.
    """

    def __init__(self, path: Path, dtype: str, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(num_threads)
        kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
        self._dtype = kinds[dtype]
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype).eval()

    def _forward(self, tokens: list[int], cache: Any = None) -> Any:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([tokens])
            return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode(self, prompt: list[int], num_tokens: int) -> Answer:
        """As OctavoSide.decode."""
        output = self._forward(prompt)
        tokens = [int(output.logits[0, -1].argmax())]
        start = time.perf_counter()
        while len(tokens) < num_tokens:
            output = self._forward(tokens[-1:], output.past_key_values)
            tokens.append(int(output.logits[0, -1].argmax()))
        return {"speed": (num_tokens - 1) / (time.perf_counter() - start), "tokens": tokens}

    def prefill(self, prompt: list[int]) -> Answer:
        """As OctavoSide.prefill."""
        start = time.perf_counter()
        int(self._forward(prompt).logits[0, -1].argmax())
        return {"speed": len(prompt) / (time.perf_counter() - start)}

    def logprobs(self, prompt: list[int]) -> Answer:
        """The log-probability of every next token."""
        logits = self._forward(prompt).logits[0, -1].float()
        return dict(enumerate(logits.log_softmax(-1).tolist()))

    def matmul_peak(self) -> Answer:
        """Operations a second of torch's own matrix product in this format: a practical ceiling."""
        import torch

        size, best = 2048, 0.0
        a = torch.randn(size, size).to(self._dtype)
        b = torch.randn(size, size).to(self._dtype)
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
        return {"speed": best}


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        side = make(*arguments)
        connection.send(("ok", None))
        while True:
            name, values = connection.recv()
            connection.send(("ok", getattr(side, name)(*values)))
    except EOFError:
        return
    except Exception:  # the caller shows it
        connection.send(("error", traceback.format_exc()))


class Remote:
    """A side in a process of its own: `remote("decode", prompt, 128)`."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, name: str, *values: Any) -> Answer:
        self._connection.send((name, values))
        return self._receive()

    def _receive(self) -> Any:
        kind, value = self._connection.recv()
        if kind == "error":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()
