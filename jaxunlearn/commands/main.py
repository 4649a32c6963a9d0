"""Class unlearning in JAX: pretrain a vision model, make it forget one class, measure what is left of it."""

import signal
import sys
from collections.abc import Sequence

from jaxunlearn.commands import audit, bench, gpu_check, leaderboard, parity, report, speed, tune
from jaxunlearn.commands.parser import Parser, exit_status, take_command
from jaxunlearn.devices.memory import plainly_started, restart_with_memory_kept
from jaxunlearn.training.stopping import SIGNALS
from jaxunlearn.version import __version__

COMMANDS = {
    "bench": bench,
    "tune": tune,
    "audit": audit,
    "leaderboard": leaderboard,
    "report": report,
    "speed": speed,
    "parity": parity,
    "gpu-check": gpu_check,
}


def make_parser() -> Parser:
    """Of `jaxunlearn`, with every subcommand."""
    parser = Parser(prog="jaxunlearn", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        summary = str(command.__doc__).splitlines()[0].rstrip(".")
        take_command(commands.add_parser(name, help=summary[0].lower() + summary[1:]), command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `jaxunlearn ARGUMENTS`."""
    return exit_status(make_parser(), arguments)


def script(name: str, arguments: Sequence[str] | None = None) -> int:
    """The exit status of `scripts/<name>.py ARGUMENTS`: the subcommand under a name of its own."""
    return exit_status(take_command(Parser(), COMMANDS[name]), arguments)


def start(name: str | None = None) -> None:
    """Runs the command, or the script of a subcommand, and ends the process with its status."""
    if plainly_started():  # else it is somebody's notebook, debugger or test
        restart_with_memory_kept()
    # What is ignored stays so, as SIGHUP under nohup.
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        status = main() if name is None else script(name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(status)
