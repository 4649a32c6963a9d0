"""The layout of the package in the pages is that of its files."""

import re
from pathlib import Path

from jaxunlearn.registry import BASELINES, names

REFERENCE = {"cases.py", "harness.py", "sides.py"}  # of PyTorch: the folder alone is named
ROOT = Path(__file__).parent.parent


def test_every_file_of_the_layout_exists():
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    named = re.findall(r"\b(\w+\.py)\b", layout)
    assert len(named) > 20
    present = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert set(named) <= present
    package = {path.name for path in (ROOT / "jaxunlearn").rglob("*.py") if not path.name.startswith("__")}
    rules = {f"{name}.py" for name in names()} | {f"torch_{name}.py" for name in BASELINES}
    assert package - set(named) == rules | REFERENCE
