"""The order of the house: what may import what. Whoever breaks it is named with file and line."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxunlearn"

# From what everything uses to what uses everything. A module imports from earlier rows and from its own room; rooms of
# one row know nothing of each other.
ORDER = [
    ("version", "errors"),
    ("randomness", "files", "benchmarks", "progress"),
    ("data", "devices", "ops"),
    ("models",),
    ("ingredients",),
    ("methods",),
    ("torch_style",),
    ("registry",),
    ("training",),
    ("evaluation",),
    ("results",),
    ("runs", "speed"),
    ("tuning", "audit"),
    ("report",),
    ("torch_reference",),
    ("gpu_check",),
    ("api", "commands"),
    ("", "__main__"),  # the package itself: what its users see
]
ROW = {room: row for row, rooms in enumerate(ORDER) for room in rooms}


def modules(folder=PACKAGE):
    """{dotted name below the package: file}; a package is named like its folder."""
    found = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name, text, known):
    """(line, module) of everything of the package that a module imports, in functions too."""
    package = name if (PACKAGE / name.replace(".", "/")).is_dir() else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, (*(["jaxunlearn", *above] if node.level else []), node.module)))
            inside = base.partition(".")[2] if base.partition(".")[0] == "jaxunlearn" else None
            submodules = [alias.name for alias in node.names if f"{inside}.{alias.name}".strip(".") in known]
            others = len(submodules) < len(node.names)
            targets = [f"{base}.{module}" for module in submodules] + [base] * others
        else:
            continue
        yield from (
            (node.lineno, target.partition(".")[2]) for target in targets if target.partition(".")[0] == "jaxunlearn"
        )


def broken(name, text, known):
    """What is against the order in the text of a module, one line each."""
    own, file = name.partition(".")[0], known[name].relative_to(PACKAGE.parent)
    for line, target in imports(name, text, known):
        room = target.partition(".")[0]
        if ROW[room] > ROW[own] or (ROW[room] == ROW[own] and room != own):
            yield f"{file}:{line} imports '{target}', which comes after '{own}'"


def test_the_picture_shows_the_rooms_in_this_order():
    picture = (PACKAGE.parent / "docs" / "rooms.svg").read_text()
    heights = {name: float(y) for y, name in re.findall(r'<text x="[\d.]+" y="([\d.]+)" [^>]*>(\w+)</text>', picture)}
    shown = [{heights[room] for room in rooms} for rooms in ORDER[:-1]]  # two rows of ours may be one of its
    assert all(len(row) == 1 for row in shown) and [min(row) for row in shown] == sorted(map(min, shown), reverse=True)


def test_every_module_has_its_place_in_the_order():
    assert {name.partition(".")[0] for name in modules()} == set(ROW)


def test_no_import_runs_against_the_order():
    known = modules()
    assert not [line for name, file in known.items() for line in broken(name, file.read_text(), known)]


def test_no_import_goes_round_in_a_circle():
    known = modules()
    graph = {
        name: {target for _, target in imports(name, file.read_text(), known) if target != name}
        for name, file in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "from jaxunlearn.files import exists"),
        ("ops.pooling", "from jaxunlearn.models import layers"),
        ("ops.pooling", "def late():\n    from jaxunlearn.devices.sharding import fetch"),
        ("methods.scrub", "import jaxunlearn.registry as registry"),
        ("data.batches", "from ..training import loop"),
        ("results.records", "from jaxunlearn import __version__"),
        ("training.loop", "from jaxunlearn.commands.main import main"),
    ],
)
def test_a_line_that_breaks_the_order_is_named(module, line):
    known = modules()
    (said,) = broken(module, known[module].read_text() + "\n" + line, known)
    last = len(known[module].read_text().splitlines()) + 1 + line.count("\n") + 1
    assert said.startswith(f"jaxunlearn/{module.replace('.', '/')}.py:{last} imports ")
