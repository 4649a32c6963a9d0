"""Parts of a text that a command makes: between a line that says how, and one that ends it."""

import re
from collections.abc import Callable

from jaxunlearn.errors import UserError

START = re.compile(r"<!-- leaderboard:(.*)-->\s*")
END = "<!-- end -->"


def remade(text: str, name: str, make: Callable[[str], str]) -> str:
    """The text with what stands between `<!-- leaderboard: ARGUMENTS -->` and `<!-- end -->` made anew.

    Args:
      text: of lines; both marks are lines of their own, and stay.
      name: of the text, for messages.
      make: what a part is to hold, from its arguments; ends with a line break.

    Raises:
      UserError: a part does not end, or `make` refuses its arguments.
    """
    kept: list[str] = []
    start = 0  # the line in which the part began, from 1; 0 outside
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if (found := START.fullmatch(line)) and not start:
            start = number
            try:
                kept += [line, "\n", make(found[1].strip()), "\n"]
            except UserError as error:
                raise UserError(f"{name}, line {number}: {error}") from error
        elif found:
            break
        elif start and line.strip() == END:
            start = 0
        if not (start or found):
            kept.append(line)
    if start:
        raise UserError(f"{name}: what begins in line {start} does not end: a line must be {END}")
    return "".join(kept)
