"""Reading messages of one or several lines at a terminal; with prompt_toolkit."""

from __future__ import annotations

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output


class LineEditor:
    """Asks for messages; the up arrow brings earlier ones back.

    A text that is pasted between two messages is kept together too: the terminal still marks it.
    """

    def __init__(self) -> None:
        # Whichever of standard output and error is a terminal. It is not asked where its cursor is:
        # the answer would come among the keys, and some never give it.
        self._output = create_output(always_prefer_tty=True)
        if hasattr(self._output, "enable_cpr"):
            self._output.enable_cpr = False
        self._session: PromptSession[str | None] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_key_bindings(),
            enable_suspend=True,
            reserve_space_for_menu=0,
            output=self._output,
        )

    def __enter__(self) -> LineEditor:
        _mark_pastes(self._output, True)
        return self

    def __exit__(self, *_: object) -> None:
        _mark_pastes(self._output, False)

    def read(self) -> str | None:
        """The next message; empty if it was dropped with Ctrl-C, None to leave."""
        try:
            return self._session.prompt()
        except (EOFError, KeyboardInterrupt):  # Ctrl-D; a signal from elsewhere
            return None
        finally:
            _mark_pastes(self._output, True)  # asking ended it


def _mark_pastes(output: Output, on: bool) -> None:
    """Let the terminal mark what is pasted (bracketed paste), or not."""
    (output.enable_bracketed_paste if on else output.disable_bracketed_paste)()
    output.flush()


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if (
            buffer.document.text_before_cursor.endswith("\\")
            and buffer.document.is_cursor_at_the_end
        ):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")  # as Enter comes where it was typed before anybody read
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c")
    def drop(event: KeyPressEvent) -> None:
        event.app.exit(result="" if event.current_buffer.text else None)

    return bindings
