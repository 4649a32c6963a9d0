"""What `--help` shows: a screen, and with --help-all everything."""

import pytest

from jaxunlearn.commands.main import COMMANDS, make_parser


@pytest.fixture
def shown(monkeypatch, capsys):
    """What the command prints on a terminal of 100 columns before it ends."""

    def of(*words):
        with pytest.raises(SystemExit) as ended:
            make_parser().parse_args(words)
        assert ended.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/somebody/.cache")  # of usual length: the help names it
    return of


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen(shown, name):
    lines = shown(name, "--help").splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith(f"usage: jaxunlearn {name} ")


@pytest.mark.parametrize("name", ["bench", "tune", "audit"])
def test_what_the_short_help_only_names_the_whole_one_explains(shown, name):
    short, whole = shown(name, "--help"), shown(name, "--help-all")
    explained, named = short.split("--help-all tells of ")
    rare = [flag for flag in named.replace(" too.", "").replace(",", "").split() if flag.startswith("--")]
    assert "--save-every" in rare and "--crop-padding" in rare
    for flag in rare:
        assert flag not in explained and f"  {flag} " in whole
    assert "  --pretrain-epochs N" in explained and "  --pretrain-epochs N" in whole
    assert short == shown(name, "--help")  # the one leaves no trace in the other


def test_the_first_help_has_a_line_for_each_command(shown):
    lines = [line.strip() for line in shown("--help").splitlines()]
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)
    for command in COMMANDS.values():
        summary = str(command.__doc__).splitlines()[0]
        assert any(line.endswith(summary[1:].rstrip(".")) for line in lines)  # whole
