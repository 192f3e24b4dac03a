"""octavo: a readable, verifiable inference engine for open language models.

    from octavo import LLM, SamplingParams
    llm = LLM("smollm2-135m")
    print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].text)

Names are imported when they are first used, so that `import octavo` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.config import EngineConfig
    from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestOutput, TokenLogprob
    from octavo.engine.pooling import EmbeddingRequestOutput
    from octavo.errors import OctavoError
    from octavo.llm import LLM
    from octavo.prompts import LoRARequest, TextPrompt, TokensPrompt
    from octavo.sampling_params import SamplingParams
    from octavo.search.params import BeamSearchParams
    from octavo.structured_outputs import StructuredOutputs

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "LoRARequest",
    "OctavoError",
    "OutputChunk",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TextPrompt",
    "TokenLogprob",
    "TokensPrompt",
]
_MODULES = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "BeamSearchParams": "octavo.search.params",
    "CompletionOutput": "octavo.engine.outputs",
    "EmbeddingRequestOutput": "octavo.engine.pooling",
    "EngineConfig": "octavo.config",
    "LoRARequest": "octavo.prompts",
    "OctavoError": "octavo.errors",
    "OutputChunk": "octavo.engine.outputs",
    "RequestOutput": "octavo.engine.outputs",
    "SamplingParams": "octavo.sampling_params",
    "StructuredOutputs": "octavo.structured_outputs",
    "TextPrompt": "octavo.prompts",
    "TokenLogprob": "octavo.engine.outputs",
    "TokensPrompt": "octavo.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
