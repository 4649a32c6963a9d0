"""What the README promises works as written."""

import re
from pathlib import Path

import jax
import pytest
from tiny import PROTOCOL, make_unlearning, mesh_of

from jaxunlearn.registry import BASELINES, get_method, names

REFERENCE = {"cases.py", "harness.py", "sides.py"}  # of PyTorch: the folder alone is named
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize(
    ("index", "file", "settings"),
    [(1, "second_thoughts.py", {"weight": "0.5"}), (2, "away.py", {"forget_epochs": "1"})],
)
def test_the_readmes_rules_are_rules(tmp_path, index, file, settings):
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 3  # the first is `jaxunlearn.run`: test_wheel.py runs it
    (tmp_path / file).write_text(codes[index])
    method = get_method(str(tmp_path / file), settings)
    with jax.set_mesh(mesh_of()):
        make_unlearning(method, PROTOCOL, mesh_of())  # checks it against the contract


def test_every_file_of_the_layout_exists():
    (layout,) = re.findall(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)
    folder = Path(__file__).parent.parent
    named = re.findall(r"\b(\w+\.py)\b", layout)
    assert len(named) > 20
    present = {path.name for path in folder.rglob("*.py") if ".venv" not in path.parts}
    assert set(named) <= present
    package = {path.name for path in (folder / "jaxunlearn").rglob("*.py") if not path.name.startswith("__")}
    rules = {f"{name}.py" for name in names()} | {f"torch_{name}.py" for name in BASELINES}
    assert package - set(named) == rules | REFERENCE
