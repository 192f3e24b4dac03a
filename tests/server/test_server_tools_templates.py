"""Which format a chat template teaches, and conversations as templates take them.

The templates have what is telling in those of the models, in our own words.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from parrot import write_parrot
from server_helpers import run, serving

from octavo.llm import LLM
from octavo.server.answers import Markup
from octavo.server.errors import ApiError
from octavo.server.options import TOOL_PARSERS, ServerOptions
from octavo.server.tool_messages import fit_conversation
from octavo.server.tools import PARSERS, TAGS, ToolFormat, detect_format, format_of
from octavo.text.chat import ChatTemplate

TALK = "{%- for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
TALK_WITH_CALLS = (
    "{%- for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}CALL"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CALL_OBJECT = (
    '\'{"name": "\' + c.function.name + \'", "arguments": \' + '
    "c.function.arguments | tojson + '}'"
)
_SEP, _BEGIN = "<｜tool▁sep｜>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


def with_calls(tools: str, call: str) -> str:
    """A template that says this of tools, and writes a call like that."""
    said = "{%- if tools %}" + tools + "{{ tools | tojson }}{% endif %}"
    return said + TALK_WITH_CALLS.replace("CALL", "{{ " + call + " }}")


NINE = "{%- if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
TEMPLATES: list[tuple[str, ToolFormat | None, str]] = [
    (
        "Qwen2.5, Qwen3, Granite 4, SmolLM3",
        "hermes",
        with_calls(
            'Within <tool_call></tool_call>: {"name": …, "arguments": …}\\n',
            f"'<tool_call>\\n' + {CALL_OBJECT} + '\\n</tool_call>'",
        ),
    ),
    (
        "Qwen3-Coder, Qwen3.5",
        "qwen3_coder",
        with_calls(
            "<tool_call>\n<function=example>\n<parameter=key>\nvalue\n</parameter>\n</function>\n"
            "</tool_call>",
            "'<tool_call>\\n<function=' + c.function.name + '>' + c.function.arguments | tojson",
        ),
    ),
    (
        "Mistral 7B v0.3",
        "mistral",
        with_calls("[AVAILABLE_TOOLS] ", f"'[TOOL_CALLS] [' + {CALL_OBJECT} + ']'"),
    ),
    (
        "Mistral Nemo, Ministral 8B, Mixtral 8x22B",
        "mistral",
        with_calls("[AVAILABLE_TOOLS]", f"'[TOOL_CALLS][' + {CALL_OBJECT} + ']'"),
    ),
    (
        "Mistral Small 3.2",
        "mistral_args",
        with_calls(
            "[AVAILABLE_TOOLS]",
            "'[TOOL_CALLS]' + c.function.name + '[CALL_ID]' + c.id + '[ARGS]' + "
            "c.function.arguments | tojson",
        ),
    ),
    (
        "Ministral 3, Devstral",
        "mistral_args",
        with_calls(
            "[AVAILABLE_TOOLS]",
            "'[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson",
        ),
    ),
    (
        "Llama 3.1 to 3.3, Llama 4",
        "llama3_json",
        with_calls(
            'Environment: ipython. {"name": function, "parameters": dictionary}',
            '\'{"name": "\' + c.function.name + \'", "parameters": \' + '
            "c.function.arguments | tojson + '}'",
        ),
    ),
    (
        "Llama 3.2, Llama 4 and Gemma 3 by vLLM's templates",
        "pythonic",
        with_calls(
            "ipython [func_name1(params_name1=params_value1, params_name2=params_value2...), "
            "func_name2(params)]",
            "'[' + c.function.name + '(' + c.function.arguments | tojson + ')]'",
        ),
    ),
    (
        "OLMo 3",
        "olmo3",
        with_calls(
            "calls within <function_calls></function_calls> <functions>",
            "'<function_calls>' + c.function.name + c.function.arguments | tojson",
        ),
    ),
    (
        "Granite 3",
        "granite",
        "{%- if tools and not available_tools %}{% set available_tools = tools %}{% endif %}"
        "{%- if available_tools %}respond only with <|tool_call|> followed by a JSON list"
        "{{ available_tools | tojson }}{% endif %}" + TALK,
    ),
    (
        "Phi-4-mini by vLLM's template",
        "phi4_mini_json",
        with_calls(
            'functools[{"name": [function name], "arguments": …}]',
            f"'functools[' + {CALL_OBJECT} + ']'",
        ),
    ),
    (
        "Phi-4-mini",
        "phi4_mini_tags",
        "{%- for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}"
        "{{ message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}{% else %}"
        "{{ message['role'] + ':' + message['content'] + ';' }}{% endif %}{% endfor %}",
    ),
    (
        "DeepSeek-R1 with tools, V3",
        "deepseek_v3",
        with_calls(
            f"{_BEGIN}function{_SEP}NAME\n```json\n{{}}\n```",
            f"'{_BEGIN}' + c.type + '{_SEP}' + c.function.name + '\\n```json\\n' + "
            "c.function.arguments | tojson + '\\n```'",
        ),
    ),
    (
        "DeepSeek-V3.1",
        "deepseek_v31",
        with_calls("Tools: ", f"'{_BEGIN}' + c.function.name + '{_SEP}' + c.function.arguments"),
    ),
    (
        "SmolLM3, as it was published",
        "hermes",
        "{%- if xml_tools or python_tools %}{% for tool in xml_tools[:] %}{{ tool | string }}"
        "{% endfor %}within <tool_call></tool_call>{% endif %}" + TALK,
    ),
    ("DeepSeek-R1's distillations", None, f"{{# {_BEGIN}function{_SEP} ```json #}}{TALK}"),
    ("Gemma 2 and 3, Phi-3, OLMo 2", None, TALK),
    ("a format of other marks", None, with_calls("<tool_call>{name}<arg_key>k</arg_key>", "c.id")),
    ("a format of other tags", None, with_calls("<tool_call><invoke name=…>", "c.id")),
    ("functools alone", None, "{# functools[ #}" + TALK),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_0123456789",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in (("add", '{"a": "é"}'), ("sub", {"b": 1}))
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789", "content": "three"},
]
KNOWN = [each for each in TEMPLATES if each[1] is not None]


@pytest.mark.parametrize(("models", "tool_format", "template"), TEMPLATES)
def test_a_template_tells_its_format(
    models: str, tool_format: ToolFormat | None, template: str
) -> None:
    assert detect_format(template) == tool_format


def test_every_format_is_told_by_some_template() -> None:
    assert {each[1] for each in KNOWN} == {*TAGS}


@pytest.mark.parametrize(("models", "tool_format", "template"), KNOWN)
def test_tools_calls_and_results_reach_the_prompt(
    models: str, tool_format: ToolFormat, template: str
) -> None:
    """Arguments are JSON text or objects, and the content is none: every template writes both."""
    messages, variables = fit_conversation(CONVERSATION, [TOOL], template, tool_format)
    prompt = ChatTemplate(template).render(messages, **variables)
    assert '"type": "object"' in prompt or "'type': 'object'" in prompt
    for part in ("Hello", "add", "sub", '"é"', '"b": 1', "three"):
        assert part in prompt, prompt


def test_calls_are_text_where_a_template_knows_none() -> None:
    by_models = {models: template for models, _, template in TEMPLATES}
    call = '{"name": "add", "arguments": {"a": "é"}}', '{"name": "sub", "arguments": {"b": 1}}'
    texts = {
        ("granite", "Granite 3"): "<|tool_call|>[{}, {}]",
        ("phi4_mini_tags", "Phi-4-mini"): "<|tool_call|>[{}, {}]<|/tool_call|>",
        ("hermes", "SmolLM3, as it was published"): (
            "<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>"
        ),
    }
    for (tool_format, models), text in texts.items():
        expected = text.format(*call)
        for content in (None, "Well: ", [{"type": "text", "text": "Well:"}]):
            messages = [CONVERSATION[0], {**CONVERSATION[1], "content": content}]
            fitted, more = fit_conversation(messages, [], by_models[models], tool_format)  # type: ignore[arg-type]
            prompt = ChatTemplate(by_models[models]).render(fitted, **more)
            before = {str: "Well: ", list: "Well:\n"}.get(type(content), "")
            assert f"assistant:{before}{expected};" in prompt
        assert CONVERSATION[1]["tool_calls"]  # the given messages stay as they are


@pytest.mark.parametrize(
    "calls", [5, [5], [{}], [{"function": {"name": "f", "arguments": "{"}}], [{"function": 5}], []]
)
def test_malformed_calls_are_left_to_the_templates_checks(calls: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    for tool_format in TAGS:
        fitted, _ = fit_conversation([message], [], TALK, tool_format)
        assert fitted == [message]


def test_mistrals_templates_get_ids_of_nine_letters() -> None:
    template = "{%- for m in messages %}{% for c in m.tool_calls or [] %}" + NINE
    template += "{{ c.id }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    for tool_format in ("mistral", "mistral_args"):
        fitted, _ = fit_conversation(CONVERSATION, [], template + "{# tool_calls #}", tool_format)
        first, second = (call["id"] for call in fitted[1]["tool_calls"])
        assert first == second == fitted[2]["tool_call_id"]
        assert re.fullmatch("[a-z0-9]{9}", first)
        again, _ = fit_conversation(fitted, [], template, "mistral_args")
        assert again[2]["tool_call_id"] == first  # such ids stay
    fitted, _ = fit_conversation(CONVERSATION, [], "tool_calls", "hermes")
    assert fitted == CONVERSATION


def test_tools_stand_in_the_system_message_where_a_template_reads_them_there() -> None:
    template = next(text for _, name, text in TEMPLATES if name == "phi4_mini_tags")
    for messages, system in (
        (CONVERSATION, "You are a helpful assistant with some tools."),
        ([{"role": "system", "content": "Be brief."}, *CONVERSATION], "Be brief."),
    ):
        fitted, _ = fit_conversation(messages, [TOOL], template, "phi4_mini_tags")
        assert fitted[0]["content"] == system
        assert json.loads(fitted[0]["tools"]) == [TOOL["function"]]
        prompt = ChatTemplate(template).render(fitted)
        assert prompt.startswith(f'{system}<|tool|>[{{"name": "add"')
    assert fit_conversation([], [TOOL], template, "phi4_mini_tags")[0] == []
    endless = {"type": "function", "function": {"name": "f", "parameters": {"a": float("inf")}}}
    with pytest.raises(ApiError, match="tools cannot be written") as wrong:
        fit_conversation(CONVERSATION, [endless], template, "phi4_mini_tags")
    assert wrong.value.param == "tools"
    assert fit_conversation(CONVERSATION[:1], [], template, "phi4_mini_tags")[0] == CONVERSATION[:1]


def test_a_parser_by_its_name_in_vllm() -> None:
    assert set(TOOL_PARSERS) == {"auto", "none", *PARSERS}
    assert {name for names in PARSERS.values() for name in names} == {*TAGS}
    assert format_of("qwen3_xml", None) == "qwen3_coder"
    assert format_of("mistral", "hermes") == "mistral"
    assert format_of("mistral", "mistral_args") == "mistral_args"
    assert format_of("phi4_mini_json", "phi4_mini_tags") == "phi4_mini_tags"
    for parser, expected in (("auto", "hermes"), ("none", None), ("llama4_pythonic", "pythonic")):
        assert ServerOptions(tool_parser=parser).markup(Markup("hermes")).tools == expected


def test_the_server_fits_conversations_to_the_template(tmp_path: Path) -> None:
    template = next(text for _, name, text in TEMPLATES if name == "phi4_mini_tags")
    marks = [*TAGS["phi4_mini_tags"], "<|tool|>"]
    chain = {"<go>": "<|tool_call|>", "<|tool_call|>": '{"name":"add"}'}
    chain['{"name":"add"}'] = "<|/tool_call|>"
    chain["<|/tool_call|>"] = "<end>"
    folder = write_parrot(tmp_path, chain, special=marks[:2], template=template + "<go>")
    llm = LLM(folder, num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, service):
            assert service.markup.tools == "phi4_mini_tags"
            body = {"messages": CONVERSATION, "tools": [TOOL], "return_token_strs": True}
            answer = await client.post("/tokenize", json=body)
            prompt = "".join(answer.json()["token_strs"]).replace("Ġ", " ")
            assert prompt.startswith("You are a helpful assistant with some tools.<|tool|>")
            assert '<|tool_call|>[{"name": "add"' in prompt
            # Special tokens stay in the text, so that the parser sees them.
            body = {"messages": CONVERSATION, "tools": [TOOL], "max_tokens": 9, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json=body)
            (choice,) = answer.json()["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "add", "arguments": "{}"}
            assert choice["finish_reason"] == "tool_calls"

    run(test)
