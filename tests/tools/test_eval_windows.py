"""Which tokens `octavo eval` scores: each once, with the context that was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidArgumentError
from octavo.eval.windows import Window, make_windows


def test_the_protocol_by_hand() -> None:
    assert make_windows(11, window=6, stride=3) == [
        Window(0, 6, 1),
        Window(3, 9, 6),
        Window(6, 11, 9),
    ]
    # Without overlap the first token of every window has no context.
    assert make_windows(9, window=4, stride=4) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert make_windows(11, window=6, stride=3, max_windows=2) == [Window(0, 6, 1), Window(3, 9, 6)]
    assert make_windows(2, window=512, stride=256) == [Window(0, 2, 1)]


@given(st.data())
def test_every_token_is_scored_once_with_enough_context(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 400))
    window = data.draw(st.integers(2, 90))
    stride = data.draw(st.integers(1, window))
    windows = make_windows(num_tokens, window, stride)
    scored = [token for w in windows for token in range(w.first_scored, w.end)]
    expected = set(range(1, num_tokens))
    if stride == window:
        expected -= set(range(0, num_tokens, window))
    assert scored == sorted(expected)
    assert sum(w.num_scored for w in windows) == len(scored)
    for w in windows:
        assert w.begin % stride == 0 and w.end - w.begin <= window
        for token in range(w.first_scored, w.end):
            assert token - w.begin >= min(token, window - stride, w.first_scored - w.begin)
            assert w.begin == 0 or stride == window or token - w.begin >= window - stride


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1, 1), "window is 1"),
        ((10, 4, 0), "stride is 0"),
        ((10, 4, 5), "stride is 5; expected 1 to 4"),
        ((10, 4, 2, 0), "max_windows is 0"),
        ((1, 4, 2), "the text has 1 token;"),
        ((0, 4, 2), "the text has 0 tokens"),
    ],
)
def test_numbers_that_allow_no_window(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_windows(*arguments)
