"""The blocks of the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))]
SHELL = ("console", "bash", "sh")  # of the first, lines that begin "$ "; the last are for machines that are not here


class Block(NamedTuple):
    """A fenced block."""

    language: str
    line: int  # of the page, at which its text begins
    text: str

    @property
    def file(self) -> str:
        """The name of the file that it is; empty where it is none."""
        named = re.match(r"# ([\w-]+\.py)\n", self.text)
        return named[1] if named and self.language == "python" else ""


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    fences = re.finditer(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2$", text, re.DOTALL | re.MULTILINE)
    return [Block(fence[3], text.count("\n", 0, fence.start()) + 2, fence[4]) for fence in fences]


def command_lines(block: Block) -> list[str]:
    """The lines of a shell block that are commands, what a backslash divides put together."""
    lines = re.sub(r" *\\\n(> )? *", " ", block.text).splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line and not line.startswith("#")]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words."""
    found: list[list[str]] = []
    for line in command_lines(block):
        found.append([])
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in lexer:
            if word in ("&&", ";", "&", "||"):
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]
