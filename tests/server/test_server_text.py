"""What special tokens, messages and parts of characters become on their way through the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from batch_helpers import CHAT, COMPLETIONS, openai, read, write
from parrot import END, GO, byte_tokens, say, write_parrot
from server_helpers import events_of, run, serving
from text_helpers import sentencepiece_directory

from octavo import LLM, SamplingParams
from octavo.cli import main
from octavo.engine.outputs import OutputChunk, TokenLogprob
from octavo.errors import InvalidArgumentError
from octavo.server.formats import ChatFormat, Head
from octavo.server.prompt_logprobs import unique_names
from octavo.text.places import TokenPlaces
from octavo.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOL_TEMPLATE = (
    "{% if tools %}Call <tool_call> with one of {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<go>"
)


def load(folder: Path) -> LLM:
    return LLM(folder, num_threads=1, num_kv_blocks=64, max_model_len=1000)


def ask(llm: LLM, *bodies: Mapping[str, Any], path: str = CHAT) -> list[httpx.Response]:
    """The answers to these bodies, one after another."""
    found = []

    async def session() -> None:
        async with serving(llm) as (client, _):
            for body in bodies:
                chat = {"messages": USER} if path == CHAT else {}
                found.append(await client.post(path, json={**chat, "temperature": 0, **body}))

    run(session)
    return found


def streamed(response: httpx.Response) -> tuple[str, list[Any], dict[str, Any]]:
    """The text, the calls and the last choice of a stream."""
    text, calls, last = "", [], {}
    for event in events_of(response.text):
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            calls += choice["delta"].get("tool_calls", [])
            last = choice if choice["finish_reason"] else last
    return text, calls, last


STOPS: list[tuple[str, dict[str, Any], str, Any]] = [
    # stop, more fields, text, stop_reason
    ("<|eot|>", {}, "Paris", "<|eot|>"),
    ("Paris<|eot|>", {}, "", "Paris<|eot|>"),
    ("s<|eot|>mo", {}, "Pari", "s<|eot|>mo"),
    ("<|eot|>mo", {"include_stop_str_in_output": True}, "Paris<|eot|>mo", "<|eot|>mo"),
    ("eot|>m", {"skip_special_tokens": False}, "Paris<|", "eot|>m"),
    ("<|eot|>x", {}, "Parismore", None),
    ("<|eot|>", {"min_tokens": 3}, "Parismore", None),
]


@pytest.fixture(scope="module")
def with_special(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    chain = say("Paris", "<|eot|>", "more")
    return load(write_parrot(tmp_path_factory.mktemp("eot"), chain, special=["<|eot|>"]))


@pytest.mark.parametrize(("stop", "fields", "text", "reason"), STOPS)
def test_a_stop_string_may_hold_a_special_token(with_special, stop, fields, text, reason):
    body = {"stop": [stop], **fields}
    whole, stream = ask(with_special, body, {**body, "stream": True})
    choice = whole.json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == (text, reason)
    assert choice["finish_reason"] == "stop"
    shown, _, last = streamed(stream)
    assert (shown, last["stop_reason"]) == (text, reason)


def test_a_stop_string_of_special_tokens_in_python(with_special):
    params = SamplingParams(temperature=0, stop="<|eot|>")
    output = with_special.chat(USER, params, progress=False)[0].outputs[0]
    assert (output.text, output.stop_reason) == ("Paris", "<|eot|>")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_tags_of_calls_are_found_also_as_special_tokens(tmp_path, special, stream):
    tags = ("<tool_call>", "</tool_call>")
    chain = say(tags[0], CALL, tags[1], "<|note|>", "done")
    folder = write_parrot(
        tmp_path, chain, special=[*(tags if special else ()), "<|note|>"], template=TOOL_TEMPLATE
    )
    llm = load(folder)
    called, plain, none = ask(
        llm,
        {"tools": TOOLS, "stream": stream},
        {"stream": stream},
        {"tools": TOOLS, "tool_choice": "none", "stream": stream},
    )
    if stream:
        text, calls, last = streamed(called)
        assert last["finish_reason"] == "tool_calls"
    else:
        choice = called.json()["choices"][0]
        text, calls = choice["message"]["content"], choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"a": 1}'}]
    assert text == "done"  # other special tokens stay hidden
    # Where nobody looks for calls the text is as ever.
    expected = f"{CALL}done" if special else f"<tool_call>{CALL}</tool_call>done"
    for response in (plain, none):
        body = streamed(response)[0] if stream else response.json()["choices"][0]["message"]
        assert (body if stream else body["content"]) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_parallel_calls_are_not_wanted(tmp_path, stream):
    other = CALL.replace("add", "now")
    text = f"<tool_call>{CALL}</tool_call><tool_call>{other}</tool_call>"
    llm = load(write_parrot(tmp_path, say(text), template=TOOL_TEMPLATE))
    names = []
    for parallel in (True, None, False):
        body = {"tools": TOOLS, "parallel_tool_calls": parallel, "stream": stream}
        response = ask(llm, body)[0]
        if stream:
            calls = streamed(response)[1]
        else:
            calls = response.json()["choices"][0]["message"]["tool_calls"]
        names.append([call["function"]["name"] for call in calls])
    assert names == [["add", "now"], ["add", "now"], ["add"]]


UNICORN = "🦄"


@pytest.fixture(scope="module")
def unicorn(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    parts = byte_tokens(UNICORN.encode())
    chain: dict[str, Any] = say("ab", *parts, "c")
    # Two parts of characters are likely at the same place.
    chain["ab"] = {parts[0]: 20.0, byte_tokens(b"\xe4")[0]: 19.0, byte_tokens(b"\xc3")[0]: 18.0}
    return load(write_parrot(tmp_path_factory.mktemp("unicorn"), chain))


@pytest.mark.parametrize("stream", [False, True])
def test_the_bytes_of_a_chat_s_tokens_are_its_text(unicorn, stream):
    body = {"logprobs": True, "top_logprobs": 3, "stream": stream}
    response = ask(unicorn, body)[0]
    if stream:
        chosen = [c for event in events_of(response.text) for c in event["choices"]]
        entries = [e for c in chosen if c["logprobs"] for e in c["logprobs"]["content"]]
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == f"ab{UNICORN}c"
        entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [
        *("ab", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x84", "c", END)
    ]
    assert bytes(b for entry in entries for b in entry["bytes"]) == f"ab{UNICORN}c".encode()
    tops = entries[1]["top_logprobs"]
    assert [top["bytes"] for top in tops] == [[0xF0], [0xE4], [0xC3]]
    assert [top["token"] for top in tops] == ["bytes:\\xf0", "bytes:\\xe4", "bytes:\\xc3"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_a_completion_have_names_and_places(unicorn, stream):
    body = {"prompt": GO, "logprobs": 3, "stream": stream}
    response = ask(unicorn, body, path=COMPLETIONS)[0]
    if stream:
        found: dict[str, list[Any]] = {}
        for event in events_of(response.text):
            for choice in event["choices"]:
                for name, column in (choice["logprobs"] or {}).items():
                    found.setdefault(name, []).extend(column)
    else:
        found = response.json()["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, 2, 2, 2, 2, 3, 4]
    assert found["tokens"][1:3] == ["bytes:\\xf0", "bytes:\\x9f"]
    # None of the three falls together with another.
    assert list(found["top_logprobs"][1]) == ["bytes:\\xf0", "bytes:\\xe4", "bytes:\\xc3"]
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob


@pytest.mark.parametrize("text", ["a<|s|>bé", "<|s|>ab", "a<|s|><|s|>", "é<go>"])
def test_the_tokens_of_an_echo_stand_where_it_says(tmp_path, text):
    llm = load(write_parrot(tmp_path, say("yes"), special=["<|s|>"]))
    body = {"echo": True, "logprobs": 1, "max_tokens": 3, "ignore_eos": True}
    bodies = [{**body, "prompt": prompt} for prompt in (text, llm.tokenizer.encode(text))]
    of_text, of_ids = (response.json() for response in ask(llm, *bodies, path=COMPLETIONS))
    assert of_text["choices"] == of_ids["choices"]
    (choice,) = of_ids["choices"]
    assert choice["text"].startswith(text)
    rows = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
    for token, offset in rows:
        character = "é" if token.startswith("bytes:") else token
        is_hidden = offset >= len(text) and token == END
        assert is_hidden or choice["text"].startswith(character, offset), (token, offset)


ENDS: list[dict[str, Any]] = [
    {"skip_special_tokens": False},
    {"skip_special_tokens": False, "include_stop_str_in_output": True},
    {"stop_token_ids": [ord("c") - 33]},
    {"ignore_eos": True, "skip_special_tokens": False, "max_tokens": 7},
    {"max_tokens": 3},
]


@pytest.mark.parametrize("fields", ENDS, ids=str)
def test_the_bytes_are_the_text_also_at_its_end(unicorn, fields):
    (choice,) = ask(unicorn, {"logprobs": True, **fields})[0].json()["choices"]
    data = bytes(b for entry in choice["logprobs"]["content"] for b in entry["bytes"])
    assert data.decode(errors="replace") == choice["message"]["content"]


def test_top_logprobs_of_a_chat_have_different_names(tmp_path):
    """At the start of a text sentencepiece's "▁the" and "the" read the same."""
    tokenizer = Tokenizer(sentencepiece_directory(tmp_path))
    spelled = {tokenizer.token(token): token for token in range(tokenizer.vocab_size)}
    word = next(word for word in spelled if word and f"▁{word}" in spelled)
    one, other = spelled[f"▁{word}"], spelled[word]
    entry = TokenLogprob(one, -0.5, (other, one), (-0.4, -0.5))
    chunk = OutputChunk("", 0, word, (one,), (entry,), "length", None)
    places = partial(TokenPlaces, tokenizer, continues=False)
    event = ChatFormat(Head("x", 0, "m"), places).piece(0, chunk, "")
    (found,) = json.loads(event.removeprefix("data: "))["choices"][0]["logprobs"]["content"]
    assert (found["token"], bytes(found["bytes"])) == (word, word.encode())
    tops = found["top_logprobs"]
    assert [top["token"] for top in tops] == [f"token_id:{other}", word]
    assert [bytes(top["bytes"]) for top in tops] == [word.encode()] * 2


def test_tokens_of_one_name_are_told_apart_by_their_number():
    places = TokenPlaces(None, continues=True)
    places.name = {7: "a", 8: "b", 9: "a"}.__getitem__  # type: ignore[method-assign]
    assert unique_names(places, (9, 7, 8, 9)) == {9: "a", 7: "token_id:7", 8: "b"}


SEEN = (
    "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}<go>"
)
ARGUMENTS = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
TALKS = {
    "arguments": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [ARGUMENTS]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ],
    "null": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "HELLO", "tool_calls": None, "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ],
    "empty": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "HELLO", "tool_calls": []},
        {"role": "user", "content": "b"},
    ],
}
PROMPTS = {
    "arguments": '[user]a[assistant]{"a": "b"}[tool]r<go>',
    "null": "[user]a[assistant]HELLO[user]b<go>",
    "empty": "[user]a[assistant]HELLO[user]b<go>",
}


def answer_batch(model: Path, folder: Path, lines: list[str]) -> dict[str, Any]:
    """The bodies of the answers by custom_id."""
    source, target = write(folder / "in.jsonl", lines), folder / "out.jsonl"
    assert main(["batch", str(source), str(target), "-m", str(model)]) == 0
    return {name: record["response"]["body"] for name, record in read(target).items()}


def test_server_batch_and_python_make_one_prompt_of_a_conversation(tmp_path):
    folder = write_parrot(tmp_path / "model", say("yes"), template=SEEN)
    llm = load(folder)
    want = {name: len(llm.encode_prompt(text).token_ids) for name, text in PROMPTS.items()}
    for name, talk in TALKS.items():
        assert llm.encode_chat(talk).text == PROMPTS[name]
    served = ask(llm, *({"messages": talk, "max_tokens": 1} for talk in TALKS.values()))
    got = [response.json()["usage"]["prompt_tokens"] for response in served]
    assert got == list(want.values())
    lines = [openai(name, CHAT, messages=talk) for name, talk in TALKS.items()]
    batched = answer_batch(folder, tmp_path, lines)
    assert {name: body["usage"]["prompt_tokens"] for name, body in batched.items()} == want


def test_a_batch_answers_as_the_server_does(tmp_path):
    """Text, calls, log-probabilities, penalties: one reader of bodies, one writer of answers."""
    tags = ["<tool_call>", "</tool_call>"]
    chain = say(tags[0], CALL, tags[1], *byte_tokens(UNICORN.encode()))
    folder = write_parrot(tmp_path / "m", chain, special=tags, template=TOOL_TEMPLATE)
    llm = load(folder)
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "calls": (CHAT, {"messages": USER, "tools": TOOLS, "logprobs": True, "top_logprobs": 2}),
        "penalty": (CHAT, {"messages": USER, "presence_penalty": 1, "logit_bias": {"65": 2}}),
        "echo": (COMPLETIONS, {"prompt": GO, "echo": True, "n": 2}),
        "logprobs": (COMPLETIONS, {"prompt": GO, "logprobs": 2}),
    }
    lines = [openai(name, url, **body, temperature=0) for name, (url, body) in bodies.items()]
    batched = answer_batch(folder, tmp_path, lines)
    written = {name: body["choices"] for name, body in batched.items()}
    for name, (url, body) in bodies.items():
        choices = ask(llm, body, path=url)[0].json()["choices"]
        for choice in [*choices, *written[name]]:
            for call in choice.get("message", {}).get("tool_calls", []):
                call.pop("id")
        assert written[name] == choices
    assert written["calls"][0]["message"]["content"] == UNICORN
    assert written["echo"][1]["text"].startswith(GO)


def bos_directory(folder: Path) -> Path:
    """A model whose tokenizer puts <s> before a text."""
    write_parrot(folder, say("yes"), special=["<s>"])
    content = json.loads((folder / "tokenizer.json").read_text())
    begin = next(t["id"] for t in content["added_tokens"] if t["content"] == "<s>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_fields_that_make_the_prompt_are_honoured(tmp_path):
    llm = load(bos_directory(tmp_path))

    def count(path: str, **fields: Any) -> int:
        base = {"prompt": "abc"} if path == COMPLETIONS else {}
        response = ask(llm, {**base, "max_tokens": 1, **fields}, path=path)[0]
        return int(response.json()["usage"]["prompt_tokens"])

    assert count(COMPLETIONS) == count(COMPLETIONS, add_special_tokens=None) == 4
    assert count(COMPLETIONS, add_special_tokens=False) == 3
    assert count(CHAT) == count(CHAT, add_special_tokens=None) == 2
    assert count(CHAT, add_special_tokens=True) == 3
    template = "{{ reasoning_effort or 'none' }}{{ messages[0].content * 5 }}"
    assert count(CHAT, chat_template=template) == len("none") + 5
    assert count(CHAT, chat_template=template, reasoning_effort="high") == len("high") + 5
    assert count(CHAT, chat_template=template, add_special_tokens=True) == len("none") + 6
    response = ask(llm, {"messages": USER, "chat_template": template}, path="/tokenize")[0]
    assert response.json()["count"] == 9
    wrong = ask(llm, {"chat_template": "{% if %}"})[0]
    assert wrong.status_code == 400
    assert "chat_template is malformed at line 1" in wrong.json()["error"]["message"]


def test_variables_of_a_template_in_python(tmp_path):
    llm = load(write_parrot(tmp_path, say("yes"), template="{{ self_ }}{{ self }}{{ date }}<go>"))
    with pytest.raises(InvalidArgumentError, match="chat_template_kwargs has 'messages'"):
        llm.chat(USER, chat_template_kwargs={"messages": USER * 2})
    variables = {"self_": 1, "self": 2, "extra": 3, "date": "4/5"}
    (output,) = llm.chat(USER, chat_template_kwargs=variables)
    assert output.prompt.endswith("4/5<go>") and output.outputs[0].text == "yes"


def test_a_template_of_a_request_may_teach_its_own_way_of_calling(tmp_path):
    llm = load(write_parrot(tmp_path, say(f"<tool_call>{CALL}</tool_call>")))
    plain, taught = ask(llm, {"tools": TOOLS}, {"tools": TOOLS, "chat_template": TOOL_TEMPLATE})
    assert plain.status_code == 400
    assert taught.json()["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("options", "is_taken"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "api_keys": ("secret",)}, True),
        ({"host": "0.0.0.0", "trust_request_chat_template": True}, True),
        ({"trust_request_chat_template": False}, False),
    ],
)
def test_templates_are_taken_from_those_who_are_trusted(tmp_path, options, is_taken):
    llm = load(write_parrot(tmp_path, say("yes")))

    async def session() -> None:
        async with serving(llm, **options) as (client, _):
            headers = {"Authorization": "Bearer secret"}
            body = {"messages": USER, "chat_template": f"own{GO}", "temperature": 0}
            response = await client.post(CHAT, json=body, headers=headers)
            if is_taken:
                assert response.json()["choices"][0]["message"]["content"] == "yes"
            else:
                assert response.status_code == 400
                error = response.json()["error"]
                assert error["param"] == "chat_template"
                assert "--trust-request-chat-template" in error["message"]

    run(session)
