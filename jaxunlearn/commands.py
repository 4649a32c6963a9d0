"""What the scripts have in common: how arguments are read, and how a command ends."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxunlearn.errors import UserError, WriteError


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse prints its usage and ends the process."""

    def __init__(self, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def exit_status(
    run: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    interrupted: str = "interrupted",
) -> int:
    """What `run` returns for the arguments; 2 and one line where they are wrong, 1 and `interrupted` after Ctrl-C."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, WriteError) else 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 1
