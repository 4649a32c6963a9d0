import io

import pytest

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.evaluation.metrics import METRICS, diverged_metrics
from jaxunlearn.results import tables

VGG = "vgg16bn-cifar100-class0"
DIGITS = "resnet20-digits-class0"
DEFAULTS = {"bad_teacher": {"reset_bn": False}, "scrub": {"temperature": 4.0, "alpha": 0.99}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def scores(retain, forget, auc):
    official = (retain + 1 - forget + 1 - auc) / 3
    symmetric = (retain + 1 - forget + 1 - 2 * abs(auc - 0.5)) / 3
    return dict(zip(METRICS, (retain, forget, auc, official, symmetric, auc, official), strict=True))


def make(method, seed=0, values=(0.9, 0.0, 0.5), hyperparameters=None, bench=DIGITS):
    return {
        "bench": bench,
        "method": method,
        "seed": seed,
        **(scores(*values) if values else diverged_metrics()),
        "before": scores(0.95 + 0.01 * seed, 0.9, 0.7),
        "hyperparameters": DEFAULTS.get(method, {}) | (hyperparameters or {}),
        "timing": {"unlearn_s": 10.0 + seed, "evaluate_s": 0.5},
        "protocol": {"precision": "tf32"},
        "environment": {"device_kind": "NVIDIA H200"},
    }


def render(records, file=None):
    file = file or io.StringIO()
    tables.print_results(records, defaults=DEFAULTS, members=500, non_members=100, file=file)
    return file.getvalue()


def test_the_heading_says_what_the_numbers_were_computed_in_and_on():
    assert line(render([make("scrub")]), DIGITS).endswith("(tf32, NVIDIA H200)")


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_one_seed_in_a_file():
    text = render([make("scrub", 42, (0.5394, 0.005, 0.4648))])
    # means of (.5394, .995, .5352) and of (.5394, .995, .9296)
    assert line(text, "scrub").split() == ["scrub", "0.5394", "0.0050", "0.4648", "0.6899", "0.8213", "1", "52.5"]
    assert line(text, "method").split() == ["method", *tables.SHOWN, "seeds", "seconds"]
    assert "500 members and 100 non-members: 0.0316, which is 0.0105 of unlearn_score and up to 0.0211 of symm" in text
    assert "\x1b" not in text and "…" not in text and "Published" not in text


def test_several_seeds_are_mean_and_sample_deviation():
    row = line(render([make("scrub", seed, (0.5 + 0.1 * seed, 0.0, 0.5)) for seed in range(3)]), "scrub")
    assert row.split()[:3] == ["scrub", "0.6000", "±0.1000"]
    assert row.split()[-2:] == ["3", "11.5"]


def test_order_is_pretrained_then_symmetric_score_then_diverged():
    records = [
        make("broken", values=None),
        make("inverted", values=(0.9, 0.0, 0.1)),
        make("good", values=(0.9, 0.0, 0.52)),
        make("exposed", values=(0.9, 0.0, 0.8)),
    ]
    rows = tables.summarize(records, {})
    assert [row.method for row in rows] == ["pretrained", "good", "exposed", "inverted", "broken"]


def test_pretrained_counts_each_seed_once():
    records = [make(method, seed) for method in ("scrub", "bad_teacher") for seed in range(2)]
    pretrained = tables.summarize(records, DEFAULTS)[0]
    assert (pretrained.method, pretrained.seeds, pretrained.seconds) == ("pretrained", 2, None)
    assert pretrained.mean["retain_acc"] == pytest.approx(0.955)
    assert [row.method for row in tables.summarize([make("retrain") | {"before": None}], {})] == ["retrain"]


def test_diverged_seeds_are_counted_not_averaged():
    some = [make("scrub", 0), make("scrub", 1, None), make("scrub", 2, None)]
    row = line(render(some), "scrub")
    assert "2 of 3 diverged" in row and "0.9000" in row and "±" not in row
    row = line(render([make("bad_teacher", seed, None) for seed in range(2)]), "bad_teacher")
    assert row.split()[:3] == ["bad_teacher", "diverged", "-"] and "2 of 2 diverged" in row and "0.0000" not in row


def test_variants_are_rows_of_their_own():
    records = [
        make("bad_teacher", 0),
        make("bad_teacher", 1),
        make("bad_teacher", 0, hyperparameters={"reset_bn": True}),
        make("my_rule", hyperparameters={"sizes": [1, 2], "note": "[bold]:smile:"}),
    ]
    text = render(records)
    assert line(text, "bad_teacher reset_bn=True").split()[-2] == "1"
    assert line(text, "bad_teacher  ").split()[-2] == "2"
    assert "my_rule sizes=[1, 2] note=[bold]:smile:" in text


def test_scores_above_retrain_are_starred():
    records = [
        make("retrain", values=(0.9, 0.0, 0.5)),
        make("inverted", values=(0.9, 0.0, 0.3)),
        make("worse", values=(0.8, 0.0, 0.5)),
        make("broken", values=None),
    ]
    text = render(records)
    assert [row.split()[0] for row in text.splitlines() if "*" in row] == ["inverted", "*"]
    assert "* above retraining from scratch: inverted membership, not better forgetting" in text
    assert "*" not in render(records[1:])
    assert "*" not in render([make("retrain", values=None), *records[1:]])


def test_published_rows():
    text = render([make("scrub", bench=VGG)])
    published = text[text.index("Published") :].splitlines()
    scrub = [row.split(maxsplit=5) for row in published if row.startswith("scrub")]
    assert scrub == [
        ["scrub", "0.451", "0.000", "0.440", "0.670", "task table"],
        ["scrub", "0.5394", "0.0000", "0.4648", "0.6915", "known fill"],
    ]
    assert sum(row.endswith("task table") for row in published) == 4
    assert sum("best submitted" in row and "0.691" in row for row in published) == 1
    assert "published tie rule" in text
    assert "NaN" in render([make("scrub", bench="mobilenetv2-fmnist-class0")])


def test_published_file_is_consistent():
    published = tables.load_published()
    for group in published["groups"]:
        assert set(group["results"]) == set(BENCHMARKS) - {DIGITS}
        for methods in group["results"].values():
            for retain, forget, auc, score in methods.values():
                rounding = 10 ** -group["digits"]
                assert score == pytest.approx((retain + 1 - forget + 1 - auc) / 3, abs=1.51 * rounding)


def test_terminal_of_80_columns():
    records = [make("negative_gradient", seed, (0.9, 0.0, 0.3), bench=VGG) for seed in range(3)]
    records += [make("bad_teacher", seed, None, {"reset_bn": True}, VGG) for seed in range(3)]
    records += [make("retrain", seed, bench=VGG) for seed in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        text = render(records, Terminal())
    plain = text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, plain.splitlines())) <= 80
    assert "…" not in plain
    lines = plain.splitlines()
    row = next(i for i, text in enumerate(lines) if text.startswith("negative_gradient "))
    assert lines[row].split()[1:] == ["0.9000", "0.0000", "0.3000", "0.8667*", "0.8333", "3", "11.5"]
    assert lines[row + 1].split() == ["±0.0000"] * 5
    row = next(i for i, text in enumerate(lines) if text.startswith("bad_teacher "))
    assert lines[row + 1].split() == ["reset_bn=True", "diverged"]


def test_ascii_output():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tables.print_results([make("scrub", s) for s in range(2)], defaults=DEFAULTS, members=5, non_members=5, file=file)
    file.seek(0)
    assert "+-0.0000" in file.read()


def test_a_collapsed_seed_is_counted_and_averaged():
    fine, collapsed = make("scrub", 1, (0.9, 0.0, 0.5)), make("scrub", 2, (0.5, 0.0, 0.5)) | {"collapsed": True}
    row = line(render([fine, collapsed]), "scrub")
    assert "0.7000" in row and "1 of 2 collapsed" in row
    assert "collapsed" not in line(render([fine]), "scrub")
