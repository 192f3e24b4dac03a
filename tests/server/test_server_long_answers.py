"""Long answers that come in small pieces: ten times the text takes ten times the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octavo.engine.outputs import OutputChunk
from octavo.server.answers import AnswerParser, Markup, Reading
from octavo.server.formats import Head
from octavo.server.message_format import Blocks
from octavo.server.reasoning import REASONING
from octavo.server.responses_format import ResponsesFormat

THINK = Markup(reasoning=REASONING["qwen3"])


def parse(reading: Reading, begin: str = "") -> Callable[[Iterator[str]], Any]:
    def take(texts: Iterator[str]) -> None:
        parser = AnswerParser(reading)
        parser.push(begin)
        for text in texts:
            parser.push(text)
        parser.finish()

    return take


def make_blocks(texts: Iterator[str]) -> None:
    blocks = Blocks()
    blocks.push(["Hi"])
    for text in texts:
        blocks.push([text])
    blocks.finish()


def respond(texts: Iterator[str]) -> None:
    answer = ResponsesFormat(Head("resp_1", 0, "m"), None, echo={})
    for text in texts:
        answer.piece(0, OutputChunk("1", 0, text), "")


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
FORCED_CALL = "<tool_call>\n<function=f>\n<parameter=a>\n"
OPEN_CALL = '<|tool_call|>[{"name": "f", "arguments": {"a": "'
COSTS: dict[str, tuple[Callable[[Iterator[str]], Any], str]] = {
    "space before thinking": (parse(Reading(THINK)), " \n"),
    "space within thinking": (parse(Reading(THINK, "inside")), " \n"),
    "space behind thoughts": (parse(Reading(THINK), "<think>Hm."), " \n"),
    "space before what may be calls": (parse(Reading(Markup("llama3_json"))), " \n"),
    "space behind a call": (parse(Reading(Markup("hermes")), CALL), " \n"),
    "a value of a call that must come": (
        parse(Reading(Markup("qwen3_coder"), calls="only"), FORCED_CALL),
        "a\n</par",
    ),
    "a value of a call that a grammar writes": (
        parse(Reading(Markup("qwen3_coder"), calls="steered"), FORCED_CALL),
        "a\n</par",
    ),
    "space before calls or a text": (parse(Reading(Markup("hermes"), calls="either")), " \n"),
    "marks within a string, all in one piece": (
        lambda texts: parse(Reading(Markup("granite")), OPEN_CALL)(iter(["".join(texts)])),
        "<tool_call>",
    ),
    "space behind a block": (make_blocks, " \n"),
    "space of a response": (respond, " \n"),
}


@pytest.mark.parametrize("name", COSTS)
def test_ten_times_the_text_takes_ten_times_the_time(name: str) -> None:
    take, unit = COSTS[name]

    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        pieces = [text[i : i + 20] for i in range(0, length, 20)]
        begun = time.process_time()
        take(iter(pieces))
        return time.process_time() - begun

    short = min(seconds(20_000) for _ in range(3))
    # What takes the square of the time takes 60 to 200 times as long.
    assert min(seconds(200_000) for _ in range(2)) < 35 * short
