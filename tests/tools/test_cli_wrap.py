"""Breaking lines between words while an answer streams to a terminal."""

from __future__ import annotations

import io
import itertools
import random

import pytest
from rich.cells import cell_len

from octavo.cli.wrap import AnswerWriter


class Screen(io.StringIO):
    """A terminal of which only the text is kept."""

    def isatty(self) -> bool:
        return True


def shown(text: str, monkeypatch: pytest.MonkeyPatch, width: int, seed: int = 0) -> str:
    """What is on the screen after the text came in parts of a few characters."""
    monkeypatch.setenv("COLUMNS", str(width))
    screen, generator = Screen(), random.Random(seed)
    writer = AnswerWriter(screen)
    while text:
        size = generator.randint(1, 6)
        writer.write(text[:size])
        text = text[size:]
    writer.end()
    return screen.getvalue()


PROSE = (
    "The quick brown fox jumps over the lazy dog, and then it rests for a while.\n\n"
    "  - Indented: a list whose entry is longer than one line of this terminal.\n"
    "naïve café, Übermut  with two blanks; an end."
)


@pytest.mark.parametrize("width", [20, 31, 80])
@pytest.mark.parametrize("seed", range(5))
def test_no_word_is_broken_and_no_line_too_wide(monkeypatch, width, seed):
    text = shown(PROSE, monkeypatch, width, seed)
    assert max(map(cell_len, text.split("\n"))) <= width
    assert text.split() == PROSE.split()
    # Nothing but blanks became line breaks, and only where the next word did not fit.
    assert [line.split() for line in PROSE.split("\n")] == [
        [word for part in paragraph for word in part.split()] for paragraph in paragraphs(text)
    ]
    for paragraph in paragraphs(text):
        for line, following in itertools.pairwise(paragraph):
            assert cell_len(line) + 1 + cell_len(following.split()[0]) > width


def paragraphs(text: str) -> list[list[str]]:
    """The lines of a screen, those of one line of PROSE together."""
    found: list[list[str]] = []
    starts = [line.split()[:2] for line in PROSE.split("\n")]
    for line in text.split("\n"):
        if line.split()[:2] in starts[len(found) : len(found) + 1]:
            found.append([line])
        else:
            found[-1].append(line)
    return found


def test_where_a_line_is_broken(monkeypatch):
    assert shown("aaa bbb ccc", monkeypatch, 7) == "aaa bbb\nccc"
    assert shown("aaa bbb  c", monkeypatch, 7) == "aaa bbb\nc"  # the blanks go
    assert shown("aaa bbbb c", monkeypatch, 7) == "aaa\nbbbb c"
    assert shown("a \n b  \n", monkeypatch, 7) == "a\n b\n"
    assert shown("aaa ", monkeypatch, 7) == "aaa "  # something may follow


def test_wide_characters_count_twice_and_need_no_blank_to_be_broken_at(monkeypatch):
    assert shown("人工智能是", monkeypatch, 6) == "人工智\n能是"
    assert shown("人工智能是", monkeypatch, 7) == "人工智\n能是"
    assert shown("人工智。能", monkeypatch, 6) == "人工\n智。能"  # a line begins with no full stop
    assert shown("the 🎉🎉 fox", monkeypatch, 8) == "the 🎉🎉\nfox"


def test_code_tables_and_long_words_are_left_to_the_terminal(monkeypatch):
    for text in (
        "```python\nprint('a line', 'wider than this')\n```",
        "~~~\nwider than twenty columns\n```\nstill in the block of code\n~~~",
        "| a table | wider than that |",
        "https://example.org/an/address/longer/than/a/line",
    ):
        assert shown(text, monkeypatch, 20) == text
    after = shown("```\nx\n```\nwords after the block", monkeypatch, 12)
    assert after == "```\nx\n```\nwords after\nthe block"
    # The terminal breaks the long word after 12 and 24 columns; the cursor is then in column 4.
    long = "1234567890123456789012345678 abcdef ghi"
    assert shown(long, monkeypatch, 12) == "1234567890123456789012345678 abcdef\nghi"


def test_a_word_far_from_the_edge_is_shown_letter_by_letter(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    writer = AnswerWriter(screen)
    writer.write("wo")
    assert screen.getvalue() == "wo"
    writer.write("rd and some more words: it")
    assert screen.getvalue() == "word and some more words:"  # "it" may grow too long
    writer.write("alianate")
    writer.write(" ")
    assert screen.getvalue() == "word and some more words: italianate"


def test_a_window_that_is_made_smaller(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    writer = AnswerWriter(screen)
    writer.write("some words on one line, ")
    monkeypatch.setenv("COLUMNS", "10")
    writer.write("and then a few")
    writer.end()
    assert screen.getvalue() == "some words on one line,\nand then a\nfew"


def test_a_pipe_gets_the_text_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    pipe = io.StringIO()
    writer = AnswerWriter(pipe)
    writer.write(PROSE)
    assert pipe.getvalue() == PROSE  # at once
    writer.end()
    assert pipe.getvalue() == PROSE
