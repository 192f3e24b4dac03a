"""What a whole answer to a conversation follows: calls, the text, and what is thought before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from octavo.server.answers import Markup
from octavo.server.protocol import ChatBody, ChatFields
from octavo.server.reasoning import ReasoningTags
from octavo.server.structured import after_reasoning, as_tag, part_of, structured_field
from octavo.server.tag_parts import Part, one_of
from octavo.server.tool_choice import call_mode, may_be_many, tools_of
from octavo.server.tool_grammar import CallGrammar
from octavo.structured_outputs import StructuredOutputs


def looked_for(body: ChatFields, markup: Markup) -> Markup:
    """What is looked for in the answer to `body`. markup: how the model writes."""
    if not isinstance(body, ChatBody):
        return markup
    mode = call_mode(body, markup.tools)
    is_whole = body.separate_reasoning is False or body.reasoning_format == "none"
    # The beginning of an answer tells calls from a schema's JSON, if no thinking is left before it.
    if mode is None or (mode == "either" and is_whole and markup.reasoning is not None):
        markup = replace(markup, tools=None)
    return replace(markup, reasoning=None) if is_whole else markup


def answer_grammar(
    body: ChatBody, asked: StructuredOutputs | None, markup: Markup, prompt: str | None
) -> StructuredOutputs | None:
    """What the answer follows; None: nothing.

    asked: what the body says of the text. prompt: its text, where it is known. Raises an ApiError
    for tools that are wrong, and InvalidArgumentError for what is too large.
    """
    found, wanted = looked_for(body, markup), asked
    mode, tags = call_mode(body, found.tools), markup.reasoning
    if found.tools is not None and mode not in (None, "free"):
        tools = tools_of(body, found.tools, mode)
        calls = CallGrammar(tools, found.tools, many=may_be_many(body))
        if mode == "steered":
            return as_tag(_in_text(calls, found.reasoning, prompt))
        part = calls.alone(mode)
        wanted = as_tag(part if asked is None else one_of([part, part_of(asked)]), asked)
    start = "behind" if tags is None else tags.start(prompt)
    if wanted is None or tags is None or start == "behind":
        return wanted
    return after_reasoning(wanted, tags, start == "inside")


def _in_text(calls: CallGrammar, tags: ReasoningTags | None, prompt: str | None) -> Part:
    """Calls in free text, behind the thinking that is told from it: the rest is searched for them.

    A thinking that may come is no text, so its tag, where it is a special token, does not begin
    one.
    """
    start = "behind" if tags is None else tags.start(prompt)
    if tags is None or start == "behind":
        return calls.in_text([])
    begin = None if start == "inside" else tags.begin
    part = calls.in_text([begin] if begin else [])
    return {"type": "after_thinking", "begin": begin, "end": tags.end, "content": part}


def parts_of(
    body: ChatBody, asked: StructuredOutputs | None, markup: Markup
) -> Iterator[tuple[str, StructuredOutputs]]:
    """What that is made of, each with the field of the body that it comes from."""
    if asked is not None:
        yield str(structured_field(body)), asked
    mode = call_mode(body, markup.tools)
    for tool in tools_of(body, markup.tools, mode) if markup.tools and mode else ():
        if tool.strict is not None:
            yield tool.place, tool.schema()
