"""What the subcommands have in common: how arguments are read, and how a command ends."""

import argparse
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

from jaxunlearn.errors import UserError, WriteError

INSTALL_TORCH = "pip install 'torch>=2.10' (in a checkout: pip install -e '.[parity]' -c constraints.txt)"


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, where argparse prints its usage and ends the process.

    Its help names what is `rarely` needed, and says more of that after --help-all.
    """

    def __init__(self, **options: Any):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)
        self._rare: list[argparse.Action] = []

    def rarely(self, *actions: argparse.Action) -> None:
        """Takes arguments of this parser out of its short help."""
        self._rare += actions

    def format_help(self) -> str:
        """The short help: it fits a screen."""
        texts = [action.help for action in self._rare]
        for action in self._rare:
            action.help = argparse.SUPPRESS
        short = super().format_help()
        for action, text in zip(self._rare, texts, strict=True):
            action.help = text
        if not self._rare:
            return short
        names = ", ".join(action.option_strings[0] for action in self._rare)
        width = shutil.get_terminal_size().columns - 2
        return f"{short}\n{textwrap.fill(f'--help-all tells of {names} too.', width, break_on_hyphens=False)}\n"

    def format_whole_help(self) -> str:
        """Help on everything."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class HelpAll(argparse.Action):
    """Prints the whole help and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_whole_help(), end="")
        parser.exit()


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
