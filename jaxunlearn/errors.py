"""The one exception that a user is meant to read, and what is made of it."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a message: more of a long name or value helps nobody


class UserError(Exception):
    """A mistake in the user's input. The message is one line: what is wrong and what to do.

    Names and values in it come from users and files, so it is made one line here: of readable length, and whatever
    would break it, drive a terminal or not be encodable is shown as an escape.
    """

    def __init__(self, message: str):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        super().__init__(printable(message))


class WriteError(UserError):
    """Results that could not be written: no mistake in the input, so a command ends with status 1, not 2."""


def printable(text: str) -> str:
    """`text` with an escape, such as \\n, in place of each character that is not printable."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """An exception's kind and its message, shortened: for the end of a line that says what failed."""
    try:
        message = str(error)
    except Exception:  # a class of the user's, whose message fails too
        message = ""
    return f"{type(error).__name__}: {textwrap.shorten(message, 200)}".removesuffix(": ")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Makes a UserError that begins with `what` of whatever a user's code raises: SystemExit and its like too.

    Only KeyboardInterrupt stays what it is: it comes from the keyboard.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{what}: {error if isinstance(error, UserError) else one_line(error)}") from error
