"""The blocks of the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = "sh"  # the language of scripts for machines that are not here
SHELL = ("console", "bash", ELSEWHERE)


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


def commands(block: Block) -> list[list[str]]:
    """The commands of a block as words: in `console`, what comes after "$ "."""
    if block.language not in SHELL:
        return []
    lines = re.sub(r" *\\\n *", " ", block.text).splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines for words in _of_line(line) if words]


def _of_line(line: str) -> list[list[str]]:
    """The commands of a line as words, `{a,b}` expanded."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in ("&&", "||", ";", "&"):
            found.append([])
        elif braces := re.fullmatch(r"(.*)\{(.+,.+)\}(.*)", word):
            found[-1] += [braces[1] + part + braces[3] for part in braces[2].split(",")]
        else:
            found[-1].append(word)
    return found
