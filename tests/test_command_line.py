import dataclasses
import shlex
from pathlib import Path

import pytest

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.commands import audit, bench
from jaxunlearn.commands.arguments import place_parts, read_protocol, seed_parts
from jaxunlearn.commands.parser import Parser
from jaxunlearn.errors import UserError
from jaxunlearn.methods import retain_finetune
from jaxunlearn.registry import BASELINES, SUBMITTED, get_method, names
from jaxunlearn.runs import request as runs_request
from jaxunlearn.runs.command_line import audit_command, command_of, seeds_as_typed, tune_command
from jaxunlearn.runs.request import Request, get_methods, parse_seeds, with_retrain

CIFAR = "resnet20-cifar10-class0"


def request_of(name, text):
    """The request of what is typed behind `jaxunlearn bench --bench NAME`, as the command makes it."""
    parser = Parser()
    bench.add_arguments(parser)
    args = parser.parse_args(["--bench", name, *shlex.split(text)])
    protocol, _, settings = read_protocol(args)
    methods = get_methods(args.method, settings, with_retrain(name, args.against_retrain))
    return Request(**place_parts(args), **seed_parts(args), protocol=protocol, methods=methods, evaluate=args.evaluate)


@pytest.mark.parametrize(
    "text",
    [
        "--method retain_finetune",
        "--method retrain --seeds 0-3,7",
        "--method scrub --seeds 5,4 --set scrub.temperature=2.0 --set scrub.forget_epochs=3",
        "--method bad_teacher --set bad_teacher.reset_bn=True --unlearn-seeds 3 --evaluate full",
        "--method scrub --against-retrain --attempts 1 --devices 2 --deterministic",
        "--method scrub --pretrain-epochs 8 --epoch-length retain --drop-last --mia-augment --train-limit 500",
        "--method scrub --validation",
        "--method scrub --no-drop-last",
        "--method scrub --set protocol.pretrain_lr=0.05 --set protocol.flip=False --set 'protocol.std=(1.0, 0.5, 1.0)'",
    ],
)
@pytest.mark.parametrize("name", [CIFAR, "resnet20-digits-class0"])
def test_the_command_of_a_record_makes_its_request_again(name, text):
    request = request_of(name, text)
    method = request.methods[-1]
    command = command_of(request, method)
    words = shlex.split(command)
    assert words[:4] == ["jaxunlearn", "bench", "--bench", name]
    again = request_of(name, shlex.join(words[4:]))
    for field in ("protocol", "seeds", "devices", "deterministic", "attempts", "unlearn_seeds", "evaluate"):
        assert getattr(again, field) == getattr(request, field)
    assert again.methods[-1] == method
    if method.name != "retrain":
        assert [one.name for one in again.methods] == [one.name for one in request.methods]


def test_the_command_of_a_study_tunes_as_it_was_tuned():
    request = request_of(CIFAR, "--method scrub --pretrain-epochs 8 --validation --set scrub.forget_epochs=3")
    command = tune_command(request, request.methods[0], 4, ["forget_epochs"], {"alpha": "0.1:0.2"})
    assert command == (
        f"jaxunlearn tune --bench {CIFAR} --method scrub --seeds 42 --trials 4 --pretrain-epochs 8 "
        "--set scrub.forget_epochs=3 --range scrub.alpha=0.1:0.2"
    )


def test_the_command_of_an_audit_says_all_that_its_models_depend_on(monkeypatch):
    text = (
        f"--bench {CIFAR} --method scrub --models 8 --pretrain-epochs 3 --set protocol.pretrain_lr=0.05 "
        "--set scrub.temperature=2.0 --deterministic"
    )
    parser = Parser()
    audit.add_arguments(parser)
    args = parser.parse_args(shlex.split(text))
    protocol, _, settings = read_protocol(args)
    methods = get_methods(args.method, settings)
    request = Request(**place_parts(args), protocol=protocol, methods=methods, seeds=range(args.models))
    assert audit_command(request, methods[0]) == f"jaxunlearn audit {text}"
    monkeypatch.setattr(runs_request, "default_precision", lambda: "tf32")  # as on a GPU
    assert "--precision fp32" in audit_command(request, methods[0])


def test_a_default_request_has_a_short_command():
    request = request_of(CIFAR, "")
    assert (
        command_of(request, request.methods[0])
        == f"jaxunlearn bench --bench {CIFAR} --method retain_finetune --seeds 42"
    )


def test_the_precision_is_said_where_the_platform_has_another(monkeypatch):
    request = request_of(CIFAR, "")
    assert "--precision" not in command_of(request, request.methods[0])
    monkeypatch.setattr(runs_request, "default_precision", lambda: "tf32")  # as on a GPU
    assert "--precision fp32" in command_of(request, request.methods[0])


def test_a_command_names_no_folder(tmp_path):
    rule = tmp_path / "mine.py"
    rule.write_text(Path(retain_finetune.__file__).read_text())
    protocol = dataclasses.replace(get_benchmark(CIFAR), init_weights="its hash")
    methods = [get_method(str(rule)), get_method(retain_finetune.rule)]
    request = Request(CIFAR, protocol, methods, [42], tmp_path, tmp_path, init_weights=tmp_path / "w.npz")
    command = command_of(request, methods[0])
    assert command.split()[5] == "mine.py" and "--init-weights w.npz" in command and str(tmp_path) not in command
    assert command_of(request, methods[1]) is None  # a function has no file


def test_groups_are_their_members_each_once():
    def chosen(*methods, **options):
        return [method.name for method in get_methods(methods, {}, **options)]

    assert chosen("baselines") == [*BASELINES]
    assert chosen("scrub", "baselines") == ["scrub", *(name for name in BASELINES if name != "scrub")]
    assert chosen("submitted", "baselines") == [*SUBMITTED, *BASELINES]
    assert chosen("all", against_retrain=True) == ["retrain", *names()]
    assert [method.name for method in get_methods(None, {})] == [*BASELINES, "output_mask"]
    with pytest.raises(UserError, match="each method once"):
        chosen("scrub", "scrub")


@pytest.mark.parametrize("text", ["42", "0-7", "1,5,9", "3-5,9,2", "9,8,7"])
def test_seeds_are_typed_as_they_are_read(text):
    assert seeds_as_typed(parse_seeds(text)) == text
