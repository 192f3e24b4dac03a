"""Which tokens of a long text are scored, and from how much context: windows and stride."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import InvalidArgumentError


@dataclass(frozen=True)
class Window:
    """Tokens begin .. end - 1 of the text go through the model together, from an empty cache.

    Scored are the tokens first_scored .. end - 1, each by what the model says one token earlier.
    """

    begin: int
    end: int
    first_scored: int

    @property
    def num_scored(self) -> int:
        return self.end - self.first_scored


def check_window(window: int) -> None:
    """InvalidArgumentError for a window in which no token could be scored."""
    if window < 2:
        raise InvalidArgumentError(f"window is {window}; expected 2 tokens or more")


def make_windows(
    num_tokens: int, window: int, stride: int, max_windows: int | None = None
) -> list[Window]:
    """The windows over a text of num_tokens tokens.

    Windows are `window` tokens long (the last may be shorter) and begin at multiples of `stride`.
    Every token is scored in the first window that holds it and once only, so that with a stride of
    half the window each token but those of the first window has at least half a window of context.
    The first token of a window has none there and is never scored in it: of the whole text that is
    the first token alone where stride < window, and every window's first where stride = window.

    This is the protocol of Hugging Face's "Perplexity of fixed-length models", by which figures for
    WikiText-2 are usually given. Raises InvalidArgumentError for numbers that allow no window.
    """
    check_window(window)
    if not 1 <= stride <= window:
        raise InvalidArgumentError(
            f"stride is {stride}; expected 1 to {window}, the window: a longer one would leave "
            "tokens out"
        )
    if max_windows is not None and max_windows < 1:
        raise InvalidArgumentError(f"max_windows is {max_windows}; expected 1 or more")
    if num_tokens < 2:
        raise InvalidArgumentError(
            f"the text has {num_tokens} token{'' if num_tokens == 1 else 's'}; expected at least "
            "2, one to be predicted from the other"
        )
    windows: list[Window] = []
    scored = 0  # tokens before this one have been dealt with
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first_scored = max(scored, begin + 1)
        if first_scored < end:
            windows.append(Window(begin, end, first_scored))
        scored = end
        if end == num_tokens or len(windows) == max_windows:
            break
    return windows
