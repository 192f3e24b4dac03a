"""What the quick-start scripts of vLLM's documentation do, with the import changed.

Written anew from their description: offline generation, chat, structured outputs,
log-probabilities, LoRA, prompts of token ids, options of loading, and the asynchronous engine.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from adapter_helpers import random_adapter, write_adapter
from quantization_helpers import CONFIG, write_float_model
from text_helpers import CHATML_TEMPLATE, byte_level_directory

from octavo import (
    LLM,
    AsyncLLM,
    LoRARequest,
    OctavoError,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import StructuredOutputsParams

PROMPTS = ["Hello, my name is", "The capital of France is", "The future of AI is"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "float"
    write_float_model(path, vocab_size=512, max_position_embeddings=512)
    byte_level_directory(path, chat_template=CHATML_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=256,
        tensor_parallel_size=1,
        gpu_memory_utilization=0.25,
        enforce_eager=True,
        trust_remote_code=True,
        seed=0,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=64,
        kv_cache_dtype="auto",
        disable_log_stats=True,
        swap_space=4,
    )


def test_the_options_mean_what_they_say(llm: LLM) -> None:
    config = llm.config
    assert (config.dtype, config.max_model_len, config.seed) == ("bf16", 256, 0)
    assert (config.kv_memory_fraction, config.max_adapters) == (0.25, 2)
    assert config.enforce_eager


def test_offline_generation(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)
    outputs = llm.generate(PROMPTS, sampling_params)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert output.prompt == prompt and output.prompt_token_ids
        (answer,) = output.outputs
        assert isinstance(answer.text, str) and len(answer.token_ids) <= 8
        assert answer.finish_reason in ("length", "stop")
    assert capsys.readouterr().out == ""
    several = llm.generate(PROMPTS[0], SamplingParams(n=3, max_tokens=4, seed=1), use_tqdm=False)
    assert [answer.index for answer in several[0].outputs] == [0, 1, 2]


def test_chat(llm: LLM) -> None:
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "Write an essay about reading."},
    ]
    params = SamplingParams(temperature=0, max_tokens=6)
    (output,) = llm.chat(conversation, params, use_tqdm=False)
    assert output.outputs[0].token_ids
    batched = llm.chat([conversation] * 3, sampling_params=params, use_tqdm=False)
    assert [one.outputs[0].text for one in batched] == [output.outputs[0].text] * 3
    template = "{% for m in messages %}{{ m['content'] }}|{{ mood }}{% endfor %}"
    (other,) = llm.chat(
        conversation[-1:],
        params,
        use_tqdm=False,
        chat_template=template,
        chat_template_kwargs={"mood": "glad"},
        add_generation_prompt=True,
    )
    assert other.prompt == "Write an essay about reading.|glad"


def test_structured_outputs(llm: LLM) -> None:
    choice = StructuredOutputsParams(choice=["Positive", "Negative"])
    params = SamplingParams(structured_outputs=choice, temperature=0)
    (output,) = llm.generate("vLLM is wonderful!", params, use_tqdm=False)
    assert output.outputs[0].text in ("Positive", "Negative")
    schema = {
        "type": "object",
        "properties": {"brand": {"enum": ["a", "b"]}, "old": {"type": "boolean"}},
        "required": ["brand", "old"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(json=schema), max_tokens=200, temperature=0
    )
    (output,) = llm.generate("A car, as JSON:", params, use_tqdm=False)
    if output.outputs[0].finish_reason == "stop":  # else it is a beginning of such a text
        assert set(json.loads(output.outputs[0].text)) == {"brand", "old"}


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, temperature=0)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    total = 0.0
    for token_id, step in zip(answer.token_ids, answer.logprobs, strict=True):
        assert 2 <= len(step) <= 3 and token_id in step
        best = max(step.items(), key=lambda item: item[1].logprob)
        assert best[1].rank == 1 and step[token_id].logprob <= best[1].logprob <= 0
        assert set(step.keys()) == set(step) and next(iter(step.values())) == step[step.token_id]
        total += step[token_id].logprob
    assert math.isclose(total, answer.cumulative_logprob or 0.0, rel_tol=1e-6)


def test_prompts_of_token_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    params = SamplingParams(temperature=0, max_tokens=5)
    given: list[Any] = [
        PROMPTS[0],
        TokensPrompt(prompt_token_ids=ids),
        TextPrompt(prompt=PROMPTS[0]),
    ]
    given += [{"prompt_token_ids": ids}, {"prompt": PROMPTS[0]}, ids]
    texts = {output.outputs[0].text for output in llm.generate(given, params, use_tqdm=False)}
    assert len(texts) == 1


def test_lora(llm: LLM, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql", random_adapter(CONFIG))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    request = LoRARequest("sql", 1, str(folder))
    for _ in range(2):  # read once, used twice
        (adapted,) = llm.generate(PROMPTS[0], params, use_tqdm=False, lora_request=request)
    (plain,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert adapted.outputs[0].token_ids != plain.outputs[0].token_ids
    with pytest.raises(InvalidArgumentError, match="expected a name of its own"):
        llm.generate("x", params, lora_request=LoRARequest("sql", 2, "/elsewhere"))


def test_the_asynchronous_engine(model: Path) -> None:
    async def main() -> tuple[str, str]:
        params = SamplingParams(temperature=0, max_tokens=6)
        async with AsyncLLM(str(model), max_model_len=128) as engine:
            whole = await engine.generate(PROMPTS[0], params, request_id="r1")
            pieces = [chunk.text async for chunk in engine.stream(PROMPTS[0], params)]
        return whole.outputs[0].text, "".join(pieces)

    whole, pieces = asyncio.run(main())
    assert whole == pieces


REFUSED = {
    "tensor_parallel_size": (0, "tensor_parallel_size is 0; expected an integer, 1 or more"),
    "pipeline_parallel_size": (2, "tensor_parallel_size divides a model among GPUs"),
    "distributed_executor_backend": ("ray", "ranks are processes of one machine"),
    "quantization": ("fp8", "quantize='int8'"),
    "download_dir": ("/data", "OCTAVO_HOME"),
    "tokenizer": ("org/other", "the tokenizer in the model's folder"),
    "revision": ("main", "--revision"),
    "task": ("embed", "runner='pooling' for embeddings"),
    "kv_cache_dtype": ("fp8", "kv_dtype is 'fp8'; expected one of"),
    "max_model_length": (4, "did you mean max_model_len?"),
    "dtype": ("float8", "dtype is 'float8'; expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_octavo_does_otherwise_is_refused_with_what_to_use(name: str) -> None:
    value, advice = REFUSED[name]
    with pytest.raises(InvalidArgumentError) as caught:
        LLM("/nowhere", **{name: value})
    assert advice in str(caught.value)


def test_both_names_of_one_option() -> None:
    with pytest.raises(InvalidArgumentError, match="both given"):
        LLM("/nowhere", gpu_memory_utilization=0.5, kv_memory_fraction=0.5)


@pytest.mark.parametrize("name", ["use_beam_search", "best_of", "guided_decoding", "output_kind"])
def test_old_fields_of_sampling_params(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"no {name}; use instead: \w+"):
        SamplingParams(**{name: 1})


@pytest.mark.parametrize("name", ["classify", "score", "reward"])
def test_other_pooling_is_refused_with_the_reason(llm: LLM, name: str) -> None:
    with pytest.raises(AttributeError, match="those of embeddings"):
        getattr(llm, name)("text")
    with pytest.raises(AttributeError, match="LLM has no nothing"):
        llm.nothing()
    assert issubclass(InvalidArgumentError, OctavoError)


def test_embeddings(model: Path) -> None:
    llm = LLM(model=str(model), runner="pooling", enforce_eager=True, max_model_len=64)
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        embedding = output.outputs.embedding
        assert output.prompt == prompt and len(embedding) == CONFIG["hidden_size"]
        assert abs(math.fsum(x * x for x in embedding.tolist()) - 1) < 1e-5
