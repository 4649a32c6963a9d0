"""What the README and the pages promise works as written."""

import re
from pathlib import Path

import jax
import pytest
from tiny import PROTOCOL, make_unlearning, mesh_of

from jaxunlearn.registry import BASELINES, get_method, names

REFERENCE = {"cases.py", "harness.py", "sides.py"}  # of PyTorch: the folder alone is named
ROOT = Path(__file__).parent.parent
# {page and name: code} of what the pages have of files, which begin with their name.
FILES = {
    f"{page.relative_to(ROOT)} {name}": code
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page.read_text(), re.DOTALL)
}
RULES = [name for name, code in FILES.items() if "rule(" in code or "def unlearn_step(" in code]


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_the_pages_are_rules(tmp_path, name):
    file = tmp_path / name.split()[1]
    file.write_text(FILES[name])
    with jax.set_mesh(mesh_of()):
        make_unlearning(get_method(str(file)), PROTOCOL, mesh_of())  # checks it against the contract


def test_there_are_rules_of_both_kinds():
    assert {"README.md second_thoughts.py", "docs/how-to/pytorch-methods.md away.py"} <= set(RULES)


def test_every_file_of_the_layout_exists():
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    named = re.findall(r"\b(\w+\.py)\b", layout)
    assert len(named) > 20
    present = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert set(named) <= present
    package = {path.name for path in (ROOT / "jaxunlearn").rglob("*.py") if not path.name.startswith("__")}
    rules = {f"{name}.py" for name in names()} | {f"torch_{name}.py" for name in BASELINES}
    assert package - set(named) == rules | REFERENCE
