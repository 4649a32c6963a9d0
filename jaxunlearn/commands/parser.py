"""What the subcommands have in common: how arguments are read, and how a command ends."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from jaxunlearn.errors import UserError, WriteError

INSTALL_TORCH = "pip install 'torch>=2.10' (in a checkout: pip install -e '.[parity]' -c constraints.txt)"


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse prints its usage and ends the process."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def take_command(parser: argparse.ArgumentParser, command: ModuleType) -> argparse.ArgumentParser:
    """Gives `parser` the arguments of a module of this room, which has `add_arguments`, `run` and `INTERRUPTED`."""
    parser.description = command.__doc__
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, interrupted=command.INTERRUPTED)
    return parser


def exit_status(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """What the command returns for the arguments; 2 and one line where they are wrong, 1 and a line after Ctrl-C."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    args = argparse.Namespace()
    try:
        args = parser.parse_args(arguments)
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, WriteError) else 2
    except KeyboardInterrupt:
        print(getattr(args, "interrupted", "interrupted"), file=sys.stderr)
        return 1
