"""The one exception that a user is meant to read, and what is made of it."""

import argparse
import textwrap
from typing import NoReturn


class UserError(Exception):
    """A mistake in the user's input. The message is one line: what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """An exception's kind and its message, shortened: for the end of a line that says what failed."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}".removesuffix(": ")


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
