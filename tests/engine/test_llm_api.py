"""LLM: forms of prompts, streaming, as_completed, errors, Ctrl-C; over the fake runtime."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import check_answers, fake_adapter, fake_engine, solo_answer
from fake_runtime import VOCAB, FakeRuntime

from octavo.config import EngineConfig
from octavo.engine.outputs import RequestOutput
from octavo.errors import EngineClosedError, InvalidArgumentError, TokenizerError
from octavo.llm import LLM
from octavo.models.adapter import Adapter
from octavo.prompts import LoRARequest
from octavo.sampling_params import SamplingParams
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}A"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from engine_helpers import plain_tokenizer_directory

    return Tokenizer(plain_tokenizer_directory(tmp_path_factory.mktemp("plain")))


@pytest.fixture
def llm(tokenizer: Tokenizer) -> LLM:
    return LLM.from_engine(fake_engine(tokenizer=tokenizer), ChatTemplate(TEMPLATE))


def ids(text: str) -> list[int]:
    return [ord(character) - 33 for character in text]


def is_clean(llm: LLM) -> bool:
    llm.engine.check_integrity()
    free = llm.engine.blocks.num_free_blocks
    return not (llm.engine.has_unfinished_requests or llm._shared.num_open) and free == 40


def test_forms_of_prompts(llm: LLM) -> None:
    text, other = "ABC", "xyz!"
    forms: list[tuple[Any, list[str]]] = [
        (text, [text]),
        ([text, other], [text, other]),
        (ids(text), [text]),
        (tuple(ids(text)), [text]),
        (np.array(ids(text)), [text]),
        ([ids(text), ids(other)], [text, other]),
        ([np.array(ids(text), np.int32)], [text]),
        ([text, ids(other)], [text, other]),
        ([], []),
        ({"prompt": text}, [text]),
        ({"prompt_token_ids": ids(text), "prompt": None}, [text]),
        ([{"prompt": text}, {"prompt_token_ids": ids(other)}, other], [text, other, other]),
    ]
    for prompts, expected in forms:
        outputs = llm.generate(prompts, GREEDY, progress=False)
        assert [list(output.prompt_token_ids) for output in outputs] == [ids(t) for t in expected]
        for output in outputs:
            check_answers(output, GREEDY)
            assert all(type(token) is int for token in output.prompt_token_ids)
    assert llm.generate(text, GREEDY, progress=False)[0].prompt == text
    assert llm.generate(ids(text), GREEDY, progress=False)[0].prompt is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"role": "user", "content": "AB"}, "use chat"),
        ({"prompt": "AB", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
        ({"prompt": 5}, 'expected {"prompt": a text}'),
        ({}, "nothing in it"),
    ],
)
def test_objects_that_are_no_prompt(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        llm.generate(prompt, GREEDY)
    with pytest.raises(InvalidArgumentError, match=f"prompt 1: .*{message}"):
        llm.generate(["AB", prompt], GREEDY)
    with pytest.raises(InvalidArgumentError, match=message):
        next(llm.stream(prompt, GREEDY))


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = [[i % 90, 3 * i % 90, i // 90] for i in range(200)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i % 13) for i in range(200)]
    outputs = llm.generate(prompts, params, progress=False)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert list(output.prompt_token_ids) == prompt
        check_answers(output, own)
    assert is_clean(llm)


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["AB", "CD"], GREEDY)
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "tokens/s" in captured.err
    assert not captured.out
    llm.generate(["AB", "CD"], GREEDY, progress=False)
    assert not capsys.readouterr().err


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "HI"}]
    output = llm.chat(conversation, GREEDY, progress=False)[0]
    assert output.prompt == "uHIA"
    check_answers(output, GREEDY)
    longer = [*conversation, {"role": "assistant", "content": "YO"}]
    outputs = llm.chat([conversation, longer], GREEDY, progress=False)
    assert [o.prompt for o in outputs] == ["uHIA", "uHIaYOA"]
    with pytest.raises(InvalidArgumentError, match="conversation 1: "):
        llm.chat([conversation, [{"content": "?"}]], GREEDY, progress=False)
    with pytest.raises(InvalidArgumentError):
        llm.chat([], GREEDY, progress=False)


def test_models_without_tokenizer_or_template(tokenizer: Tokenizer) -> None:
    bare = LLM.from_engine(fake_engine())
    output = bare.generate([1, 2, 3], GREEDY, progress=False)[0]
    assert output.text == "" and len(output.outputs[0].token_ids) == 9
    with pytest.raises(TokenizerError, match="no tokenizer: give the prompt as token ids"):
        bare.generate("ABC", GREEDY, progress=False)
    base = LLM.from_engine(fake_engine(tokenizer=tokenizer))
    with pytest.raises(TokenizerError, match="no chat template"):
        base.chat([{"role": "user", "content": "HI"}], GREEDY, progress=False)


def test_stream_gives_what_generate_gives(llm: LLM) -> None:
    whole = llm.generate("ABC", GREEDY, progress=False)[0]
    chunks = list(llm.stream("ABC", GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.result is None for chunk in chunks] == [True] * 8 + [False]
    assert chunks[-1].result is not None
    assert chunks[-1].result.outputs == whole.outputs
    conversation = [{"role": "user", "content": "HI"}]
    assert "".join(c.text for c in llm.stream(conversation, GREEDY)) == (
        llm.chat(conversation, GREEDY, progress=False)[0].text
    )
    assert is_clean(llm)


def test_streams_may_be_read_side_by_side_and_left_early(llm: LLM) -> None:
    first, second = llm.stream("AB", GREEDY), llm.stream("BA", GREEDY)
    texts = ["", ""]
    for a, b in zip(first, second, strict=True):
        texts[0] += a.text
        texts[1] += b.text
    assert texts == [o.text for o in llm.generate(["AB", "BA"], GREEDY, progress=False)]

    third = llm.stream("AB", GREEDY)
    next(third)
    between = llm.generate(["BA"], GREEDY, progress=False)[0]  # runs beside the open stream
    assert between.text == texts[1]
    next(third)
    third.close()
    llm.stream("AB", GREEDY)  # never read: never started
    assert is_clean(llm)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", 'the prompt is ""'),
        (["AB", ""], 'prompt 1: the prompt is ""'),
        (["AB", "CD", "E" * 48], "prompt 2: the prompt is too long: it has 48 tokens; expected"),
        ([[1], []], "prompt 1: the prompt has no tokens"),
        ([[1], [VOCAB + 3]], f"prompt 1: token 0 of the prompt is {VOCAB + 3}; expected 0 to 96"),
        ([1, 2.5], "token 1 of the prompt is 2.5; expected an integer"),
        (7, "prompts is 7; expected a text"),
        (["AB", 7], "prompt 1: the prompt is 7; expected a text, token ids"),
        ([None, "AB"], "prompt 0: the prompt is None; expected a text, token ids"),
        ({"prompt_token_ids": 7}, "the prompt is 7; expected a text, token ids"),
    ],
)
def test_one_bad_prompt_stops_all_before_any_runs(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        llm.generate(prompts, GREEDY, progress=False)
    assert str(caught.value).startswith(message)
    assert llm.engine.num_steps == 0 and is_clean(llm)
    with pytest.raises(InvalidArgumentError):  # a stream tells at once, not when it is read
        llm.stream("E" * 48)


def test_bad_params(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match="params has 1 entries for 2 prompts"):
        llm.generate(["A", "B"], [GREEDY], progress=False)
    wrong: Any = {"temperature": 0}
    for ask in (llm.generate, llm.stream, lambda _, own: llm.generate("A", [GREEDY, own])):
        with pytest.raises(InvalidArgumentError, match="params is {'temperature': 0}; expected"):
            ask("A", wrong)
    keyed = llm.generate_as_completed([(1, "A", wrong), (2, "A", GREEDY)])
    assert sorted((key, bool(output.error)) for key, output in keyed) == [(1, True), (2, False)]
    with pytest.raises(InvalidArgumentError, match="lora_request is 'sql'; expected LoRARequest"):
        llm.generate("A", GREEDY, lora_request="sql")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"the adapter \['sql'\] is not loaded"):
        llm.generate("A", GREEDY, adapter=["sql"], progress=False)  # type: ignore[arg-type]
    for messages in ({"role": "user", "content": "HI"}, "HI", 3):
        with pytest.raises(InvalidArgumentError, match="expected a list of messages, as "):
            llm.chat(messages, GREEDY)  # type: ignore[arg-type]
    assert is_clean(llm)
    with pytest.raises(InvalidArgumentError, match="LLM has no option max_len, temperature"):
        LLM("/nowhere", max_len=4, temperature=1)
    with pytest.raises(InvalidArgumentError, match="block_size is 7"):
        LLM("/nowhere", config=EngineConfig(seed=2), block_size=7)


def test_as_completed_takes_items_lazily_and_goes_on_after_bad_ones(llm: LLM) -> None:
    taken: list[int] = []
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    def items() -> Iterator[tuple[int, Any, SamplingParams]]:
        for i in range(60):
            taken.append(i)
            conversation = [{"role": "user", "content": "HI"}]
            prompt: Any = [[i % 90, 5], "AB", conversation, "", [VOCAB]][i % 5]
            yield i, prompt, params

    outputs: dict[int, RequestOutput] = {}
    for key, output in llm.generate_as_completed(items(), max_in_flight=7):
        outputs[key] = output
        assert len(taken) <= len(outputs) + 7 + 1
    assert sorted(outputs) == list(range(60))
    for key, output in outputs.items():
        if key % 5 < 3:
            check_answers(output, params)
        else:
            assert output.error and not output.outputs
    assert outputs[2].prompt == "uHIA"
    assert is_clean(llm)


def test_as_completed_goes_on_when_all_that_fit_in_were_bad(llm: LLM) -> None:
    items: list[tuple[int, Any, SamplingParams]] = [(i, [VOCAB], GREEDY) for i in range(7)]
    found = dict(llm.generate_as_completed([*items, (7, "AB", GREEDY)], max_in_flight=3))
    assert [found[i].error is None for i in range(8)] == [False] * 7 + [True]


def errors_of(llm: LLM, items: list[tuple[Any, ...]]) -> dict[Any, str | None]:
    found = dict(llm.generate_as_completed(items))
    assert all(bool(output.error) != bool(output.outputs) for output in found.values())
    assert is_clean(llm)
    return {key: output.error for key, output in found.items()}


def test_as_completed_goes_on_after_what_the_engine_refuses(tokenizer: Tokenizer) -> None:
    is_damaged = False

    def read(path: Path) -> Adapter:
        return fake_adapter(path / "damaged" if is_damaged else path)

    engine = fake_engine(tokenizer=tokenizer, max_adapters=1, read_adapter=read)
    llm = LLM.from_engine(engine)
    for name in ("7", "8"):  # there is a place for one of them
        llm.load_adapter(name, f"/adapters/{name}")
    named: list[tuple[Any, ...]] = [(each, "AB", GREEDY, each) for each in ("7", "8", "9", None)]
    found = errors_of(llm, [*named, ("none", None, GREEDY), ("number", 123, GREEDY)])
    assert found.pop("7") is None and found.pop(None) is None
    for key, message in {
        "8": "requests use all 1 places for adapters",
        "9": "the adapter '9' is not loaded",
        "none": "the prompt is None; expected a text",
        "number": "the prompt is 123; expected a text",
    }.items():
        assert (found.pop(key) or "").startswith(message)
    assert not found
    is_damaged = True
    found = errors_of(llm, named[1:])
    assert found["8"] == "the adapter in /adapters/8/damaged is damaged" and found[None] is None

    busy = LLM.from_engine(fake_engine(tokenizer=tokenizer, max_waiting_requests=1, max_num_seqs=2))
    found = errors_of(busy, [(i, "AB", GREEDY) for i in range(5)])
    assert [i for i in range(5) if "the queue is full" in (found[i] or "")] == [3, 4]
    busy.close()  # which is no matter of one item
    with pytest.raises(EngineClosedError):
        next(busy.generate_as_completed([(0, "AB", GREEDY)]))


def test_as_completed_draws_seeds_by_key(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def run(keys: list[str]) -> dict[str, str]:
        llm = LLM.from_engine(fake_engine(tokenizer=tokenizer))
        found = llm.generate_as_completed((key, "AB", params) for key in keys)
        return {key: output.text for key, output in found}

    whole = run(["a", "b", "c", "d"])
    assert len(set(whole.values())) == 4
    assert run(["c", "d"]) == {key: whole[key] for key in "cd"}  # as after a resumption


def test_as_completed_left_early(llm: LLM) -> None:
    for _ in llm.generate_as_completed((i, "AB", GREEDY) for i in range(10**9)):
        break
    assert is_clean(llm)


def test_interrupt_leaves_the_engine_clean(llm: LLM) -> None:
    runtime = llm.engine.runtime
    assert isinstance(runtime, FakeRuntime)
    submit = runtime.submit

    def interrupting_submit(batch: Any, **options: Any) -> int:
        if len(runtime.batches) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return submit(batch, **options)

    runtime.submit = interrupting_submit  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["AB", "CD", "EF"], GREEDY, progress=False)
    assert len(runtime.batches) == 4  # the step was finished first
    assert is_clean(llm)
    check_answers(llm.generate("AB", GREEDY, progress=False)[0], GREEDY)


def test_a_failing_step_leaves_the_engine_clean(llm: LLM) -> None:
    runtime = llm.engine.runtime
    assert isinstance(runtime, FakeRuntime)
    runtime.fail_next = MemoryError("no more")
    with pytest.raises(MemoryError):
        llm.generate(["AB", "CD", "EF"], GREEDY, progress=False)
    assert is_clean(llm)
    check_answers(llm.generate("AB", GREEDY, progress=False)[0], GREEDY)


def test_sampled_answers_are_the_same_when_a_program_is_run_again(tokenizer: Tokenizer) -> None:
    def run(seed: int) -> list[str]:
        llm = LLM.from_engine(fake_engine(tokenizer=tokenizer, seed=seed))
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        return [llm.generate("AB", params, progress=False)[0].text for _ in range(3)]

    assert run(0) == run(0)
    assert len(set(run(0) + run(1))) == 6


def test_answers_equal_the_fake_model_alone(llm: LLM) -> None:
    answer = llm.generate("ABC", GREEDY, progress=False)[0].outputs[0]
    assert answer.token_ids == solo_answer(ids("ABC"), GREEDY).token_ids
    assert answer.text == "".join(chr(33 + t) for t in answer.token_ids if t != 5)


def test_import_is_quick_and_lazy() -> None:
    program = (
        "import sys, time; t = time.process_time(); import octavo; octavo.SamplingParams;"
        "print(time.process_time() - t);"
        "print([m for m in ('rich', 'jinja2', 'tokenizers', 'gguf', 'huggingface_hub', 'numpy')"
        " if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    seconds, modules = result.stdout.splitlines()
    assert float(seconds) < 0.5 and modules == "[]"


def test_public_names() -> None:
    import octavo

    assert octavo.LLM is LLM
    assert {"LLM", "SamplingParams", "RequestOutput"} <= set(dir(octavo))
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        octavo.Nothing  # noqa: B018


def test_paths_in_messages(tmp_path: Path) -> None:
    from octavo.errors import ModelNotFoundError

    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(tmp_path / "nowhere")


# ---- as vLLM's users know it ----


def test_the_names_of_vllm(llm: LLM) -> None:
    expected = llm.generate("ABC", GREEDY, progress=False)[0].outputs
    assert llm.generate("ABC", sampling_params=GREEDY, use_tqdm=False)[0].outputs == expected
    messages = [{"role": "user", "content": "B"}]
    answer = llm.chat(messages, sampling_params=GREEDY, use_tqdm=False)[0]
    assert answer.outputs == llm.chat(messages, GREEDY, progress=False)[0].outputs
    assert llm.get_tokenizer().encode("AB") == ids("AB")
    with pytest.raises(InvalidArgumentError, match="both given"):
        llm.generate("ABC", GREEDY, sampling_params=GREEDY)


def test_an_unknown_field_of_sampling_params() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no temprature \(did you mean temperature\?\)"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]


def test_a_closed_model_frees_its_runtime(llm: LLM) -> None:
    runtime = weakref.ref(llm.engine.runtime)
    with llm as entered:
        assert entered is llm
        stream = llm.stream("ABC", GREEDY)
        next(stream)
    assert runtime() is None
    uses: list[Callable[[], Any]] = [
        lambda: llm.generate("A", GREEDY, progress=False),
        lambda: list(stream),
        lambda: llm.generate("A", lora_request=LoRARequest("a", 1, "folder")),
        lambda: llm.load_adapter("a", "folder"),
        lambda: llm.unload_adapter("a"),
    ]
    for ask in uses:
        with pytest.raises(EngineClosedError, match="load it again"):
            ask()
    llm.close()  # twice does no harm
