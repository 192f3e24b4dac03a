"""Chat templates: where they are found, what they render, how they fail."""

from __future__ import annotations

import json
import re

import pytest
from text_helpers import CHATML_TEMPLATE, LLAMA3_TEMPLATE, byte_level_directory

from octavo.errors import InvalidArgumentError, TokenizerError
from octavo.quantize.writer import copy_files
from octavo.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "What is 1 < 2 & 'ä'?"}]


def test_chatml_renders_as_written():
    text = ChatTemplate(CHATML_TEMPLATE).render(MESSAGES)
    assert text == (
        '<|im_start|>system\nAnswer briefly; today\'s words: ["ä", "<b>", 1].<|im_end|>\n'
        "<|im_start|>user\nWhat is 1 < 2 & 'ä'?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llama3_renders_as_written():
    template = ChatTemplate(LLAMA3_TEMPLATE, special_tokens={"bos_token": "<|begin|>"})
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "tool", "content": "left out by the template's continue"},
        {"role": "assistant", "content": "fine"},
    ]
    text = template.render(messages, add_generation_prompt=False, date_string="1999")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == (
        f"<|begin|>{head.format('system')}Year: 1999\nBe kind.<|eot_id|>"
        f"{head.format('user')}a\nb<|eot_id|>{head.format('assistant')}fine<|eot_id|>"
    )


def test_the_template_can_refuse():
    template = ChatTemplate(LLAMA3_TEMPLATE, special_tokens={"bos_token": ""})
    with pytest.raises(TokenizerError, match="refuses these messages: Unknown role: wizard"):
        template.render([{"role": "wizard", "content": "abracadabra"}])


def test_places_are_searched_in_transformers_order(tmp_path):
    assert ChatTemplate.load(byte_level_directory(tmp_path)) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "oldest"}))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "oldest"
    byte_level_directory(tmp_path, chat_template="string")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "string"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    byte_level_directory(tmp_path, chat_template=named)
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "d"
    assert ChatTemplate.load(tmp_path, "tool_use").render(MESSAGES) == "t"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }} newest")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "<|im_end|> newest"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert ChatTemplate.load(tmp_path, "rag").render(MESSAGES) == "rag"


def test_a_quantized_model_has_the_named_templates(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    (source / "chat_template.jinja").write_text("d")
    target.mkdir()
    copy_files(source, target)
    assert ChatTemplate.load(target).render(MESSAGES, tools=[]) == "t"


def test_the_template_named_tool_use_is_for_messages_with_tools(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "{{ tools }}"}]
    template = ChatTemplate.load(byte_level_directory(tmp_path, chat_template=named))
    assert template.render(MESSAGES) == template.render(MESSAGES, tools=None) == "d"
    assert template.render(MESSAGES, tools=[1]) == "[1]"
    assert template.source == "d" and template.with_tools.source == "{{ tools }}"


@pytest.mark.parametrize(
    "found",
    [17, [], [{"name": "default"}], [{"template": "x"}], [3], [{"name": ["x"], "template": "x"}]],
)
def test_a_malformed_entry_is_refused(tmp_path, found):
    byte_level_directory(tmp_path, chat_template=found)
    with pytest.raises(TokenizerError, match="chat_template"):
        ChatTemplate.load(tmp_path)


def test_named_templates_without_a_default(tmp_path):
    byte_level_directory(tmp_path, chat_template=[{"name": "rag", "template": "r"}])
    with pytest.raises(TokenizerError, match="no chat template named 'default'; it has rag"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("line\n{% if %}", "malformed at line 2"),
        ("{{ messages[7].content }}", "fails"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "fails"),
    ],
)
def test_template_errors_are_typed(source, cause):
    with pytest.raises(TokenizerError, match=cause):
        ChatTemplate(source, origin="here.jinja").render(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "expected a list"),
        ({"role": "user"}, "expected a list"),
        ([], "is empty"),
        (["hi"], r"messages\[0\] is str"),
        ([{"content": "x"}], "has the role None"),
        ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], r"messages\[1\]"),
        ([{"role": "user"}], "content is None; expected a string"),
        ([{"role": "user", "content": 3}], "expected a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text parts only"),
    ],
)
def test_malformed_messages_are_refused(messages, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        ChatTemplate("x").render(messages)


def test_null_content_beside_tool_calls_is_an_empty_string():
    calls = [{"id": "1", "function": {"name": "f"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert ChatTemplate("[{{ messages[0].content }}]").render([message]) == "[]"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
# Ways of writing a call (as DeepSeek-R1's template of January 2025 and later ones), and what they
# make of one.
_NAME = "{{ call.function.name + ' ' + call.function.arguments }}"
CALLS_WRITTEN = {
    "{% if m.content is none %}{% for call in m.tool_calls %}" + _NAME + "{% endfor %}{% endif %}"
    "{% if m.content is not none %}{{ m.content + '!' }}{% endif %}": 'f {"city": "Paris"}',
    "{% for call in m.tool_calls or [] %}{{ m.content }}" + _NAME + "{% endfor %}": (
        'Well.f {"city": "Paris"}'
    ),
    "{% if m.content is none %}{{ m.tool_calls[0].function | tojson }}{% endif %}": (
        '{"name": "f", "arguments": {"city": "Paris"}}'
    ),
}


@pytest.mark.parametrize("source", CALLS_WRITTEN)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_a_call_is_given_as_its_template_writes_it(source, tools):
    template = ChatTemplate("{{ tools }}{% for m in messages %}" + source + "{% endfor %}")
    message = {"role": "assistant", "content": "Well.", "tool_calls": [CALL]}
    assert template.render([message], tools=tools) == f"{tools}{CALLS_WRITTEN[source]}"


def test_a_call_does_not_vanish():
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls[0].function }}{% endfor %}")
    message = {"role": "assistant", "tool_calls": [CALL, CALL]}
    with pytest.raises(TokenizerError, match="leaves out a call of tools .* call f, f"):
        template.render([message])
    refusing = ChatTemplate("{% if messages[0].tool_calls %}{{ raise_exception('no') }}{% endif %}")
    with pytest.raises(TokenizerError, match="refuses these messages: no"):
        refusing.render([message])


SEEN = (
    "{% for m in messages %}{% for name in m | sort %}{{ name }}={{ m[name] | tojson }};"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        # What openai's client has of an answer, when it is sent back.
        (
            {
                **{"role": "assistant", "content": "Hi", "refusal": None, "annotations": None},
                **{"audio": None, "function_call": None, "tool_calls": None, "name": None},
            },
            'content="Hi";role="assistant";',
        ),
        (
            {"role": "assistant", "content": "Hi", "tool_calls": []},
            'content="Hi";role="assistant";',
        ),
        ({"role": "assistant", "content": None}, 'content="";role="assistant";'),
        ({"role": "assistant"}, 'content="";role="assistant";'),
        ({"role": "assistant", "content": []}, 'content="";role="assistant";'),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            'content="";role="assistant";tool_calls=[{"id": "1", "type": "function", '
            '"function": {"name": "f", "arguments": {"city": "Paris"}}}];',
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            'content="";role="assistant";'
            'tool_calls=[{"function": {"name": "f", "arguments": {}}, "type": "function"}];',
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": None, "index": None, "function": {"name": "f", "arguments": {"a": 1}}}
                ],
            },
            'content="";role="assistant";'
            'tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}, "type": "function"}];',
        ),
        (
            {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]},
            'content="a\\nb";role="user";',
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            'content="No.";role="assistant";',
        ),
        (
            {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"},
            'content="";name="f";role="tool";tool_call_id="1";',
        ),
    ],
)
def test_what_a_template_sees_of_a_message(message, seen):
    assert ChatTemplate(SEEN).render([message]) == seen


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tool_calls": "f()"}, r"messages\[0\].tool_calls is str; expected a list"),
        ({"tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] has no name of a function"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "no JSON"),
        ({"function_call": {"name": "f"}}, "old form of a call; expected tool_calls"),
        ({"content": [{"type": {"a": 1}}]}, "text parts only"),
        ({"content": [{"type": "text", "text": None}]}, "text parts only"),
        ({"content": 5}, "expected a string"),
    ],
)
def test_a_malformed_answer_of_before_is_named(fields, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        ChatTemplate(SEEN).render([{"role": "assistant", "content": "x", **fields}])


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": {"id": "a", "arguments": "card 4929 1234"}},
        {"tool_calls": "card 4929 1234"},
        {"tool_calls": [{"function": {"name": "f", "arguments": "card 4929 1234"}}]},
        {"content": {"text": "card 4929 1234"}},
        {"content": [{"type": {"text": "card 4929 1234"}}]},
        {"role": ["card 4929 1234"]},
    ],
    ids=str,
)
def test_errors_quote_nothing_of_what_was_said(fields):
    with pytest.raises(InvalidArgumentError) as error:
        ChatTemplate(SEEN).render([{"role": "assistant", "content": "x", **fields}])
    assert "4929" not in str(error.value)
    assert re.search(r"messages\[0\]", str(error.value))


def test_the_messages_of_the_caller_stay_as_they_are():
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    ChatTemplate(SEEN).render([message])
    assert CALL["function"] == {"name": "f", "arguments": '{"city": "Paris"}'}
    assert message["content"] is None
