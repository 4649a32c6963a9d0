import io
import re

import pytest

from jaxunlearn.evaluation.metrics import diverged_metrics
from jaxunlearn.results import tables
from jaxunlearn.results.rows import SHOWN, summarize

VGG = "vgg16bn-cifar100-class0"
DIGITS = "resnet20-digits-class0"
FLAGS = ("collapsed", "inverted_membership", "above_retrain", "output_mask")
DEFAULTS = {"bad_teacher": {"reset_bn": False}, "scrub": {"temperature": 4.0, "alpha": 0.99}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def scores(retain, forget, auc):
    official = (retain + 1 - forget + 1 - auc) / 3
    symmetric = (retain + 1 - forget + 1 - 2 * abs(auc - 0.5)) / 3
    named = {"retain_acc": retain, "forget_acc": forget, "unlearn_score": official, "symmetric_score": symmetric}
    areas = dict.fromkeys(("forget_mia_auc", "forget_mia_auc_published"), auc)
    return named | areas | {"forget_mia_auc_augmented": auc - 0.01, "unlearn_score_published": official}


def make(method, seed=0, values=(0.9, 0.0, 0.5), hyperparameters=None, bench=DIGITS, gap=None, unlearn_seed=0, **flags):
    return {
        "bench": bench,
        "method": method,
        "seed": seed,
        "unlearn_seed": unlearn_seed,
        "companions": {"against_retrain": None if gap is None else {"average_gap": gap}} if values else None,
        "flags": dict.fromkeys(FLAGS) | flags,
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
    held_out = make("scrub") | {"protocol": {"precision": "tf32", "validation": True}}
    assert line(render([held_out]), DIGITS).endswith("(tf32, NVIDIA H200, validation images)")


def line(text, start):
    """The first line that starts with it, or of the table with its rank and it."""
    return next(line for line in text.splitlines() if re.match(rf"((ref|\d+|-) +)?{re.escape(start)}", line))


def test_one_seed_in_a_file():
    text = render([make("scrub", 42, (0.5394, 0.005, 0.4648))])
    # means of (.5394, .995, .5352) and of (.5394, .995, .9296)
    cells = ["-", "scrub", "0.5394", "0.0050", "0.4648", "0.4548", "0.6899", "0.8213", "-", "1", "52.5"]
    assert line(text, "scrub").split() == cells
    short = [*SHOWN[:3], "auc_augmented", "unlearn_score", "symmetric_score", "avg_gap"]
    assert line(text, "rank").split() == ["rank", "method", *short, "seeds", "seconds", "flags"]
    assert "500 members and 100 non-members: 0.0316, which is 0.0105 of unlearn_score and up to 0.0211 of symm" in text
    assert "\x1b" not in text and "…" not in text and "Published" not in text and "±" not in text
    assert "With one seed nothing is ranked." in text and "differences are ties." in text and "docs/metrics.md" in text


def test_several_seeds_are_mean_and_half_the_interval_of_the_mean():
    records = [make("scrub", seed, (0.5 + 0.1 * seed, 0.0, 0.5), gap=0.1 * seed) for seed in range(3)]
    row = line(text := render(records), "scrub")
    # t(.975, 2) = 4.3027, of which sqrt(3) is .1 / .0402
    assert row.split()[:3] == ["1", "scrub", "0.6000±0.2484"]
    assert row.split()[-3:] == ["0.1000±0.2484", "3", "11.5"]
    assert "± is half the 95% t-interval" in text and "± leaves it out" in text and "With one seed" not in text
    row = summarize(records, {})[1]
    assert (row.std["retain_acc"], row.half_width["retain_acc"]) == pytest.approx((0.1, 0.24841), abs=1e-5)


def test_order_is_pretrained_then_symmetric_score_then_diverged():
    records = [
        make("broken", values=None),
        make("inverted", values=(0.9, 0.0, 0.1)),
        make("good", values=(0.9, 0.0, 0.52)),
        make("exposed", values=(0.9, 0.0, 0.8)),
    ]
    rows = summarize(records, {})
    assert [row.method for row in rows] == ["pretrained", "good", "exposed", "inverted", "broken"]


def test_pretrained_counts_each_seed_once():
    records = [make(method, seed) for method in ("scrub", "bad_teacher") for seed in range(2)]
    pretrained = summarize(records, DEFAULTS)[0]
    assert (pretrained.method, pretrained.seeds, pretrained.seconds) == ("pretrained", 2, None)
    assert pretrained.mean["retain_acc"] == pytest.approx(0.955)
    assert [row.method for row in summarize([make("retrain") | {"before": None}], {})] == ["retrain"]


@pytest.mark.parametrize("order", [1, -1])
def test_pretrained_is_of_the_record_that_says_most_of_a_seed(order):
    whole, older = make("scrub"), make("bad_teacher")
    whole["before"]["companions"] = {"against_retrain": {"average_gap": 0.2}}
    older["before"]["forget_mia_auc_augmented"] = None
    pretrained = summarize([whole, older][::order], DEFAULTS)[0]
    assert pretrained.mean["average_gap"] == 0.2 and pretrained.mean["forget_mia_auc_augmented"] == pytest.approx(0.69)


def test_what_retrained_models_differ_from_each_other_by_has_no_interval():
    rows = summarize([make(method, seed, gap=0.1 * seed) for method in ("retrain", "scrub") for seed in range(3)], {})
    found = {row.method: row.half_width for row in rows}
    assert "average_gap" in found["scrub"] and "average_gap" not in found["retrain"]
    assert "retain_acc" in found["retrain"]


def test_seconds_on_another_device_than_the_records_are_left_out():
    def trained(kind, seed):
        return make("retrain", seed) | {"environment": {"device_kind": "cpu", "trained_on": {"unlearn": kind}}}

    kinds = (["cpu"], ["NVIDIA H200"], ["NVIDIA H200", "cpu"])
    here, *elsewhere = (trained(kind, seed) for seed, kind in enumerate(kinds))
    assert summarize([here, *elsewhere], {})[1].seconds == summarize([here], {})[1].seconds == 10.5
    assert summarize(elsewhere, {})[1].seconds is None


def test_diverged_seeds_are_counted_not_averaged():
    some = [make("scrub", 0), make("scrub", 1, None), make("scrub", 2, None)]
    row = line(render(some), "scrub")
    assert "2 of 3 diverged" in row and "0.9000" in row and "±" not in row and row.startswith("- ")
    row = line(render([make("bad_teacher", seed, None) for seed in range(2)]), "bad_teacher")
    assert row.split()[:4] == ["-", "bad_teacher", "diverged", "-"]
    assert "2 of 2 diverged" in row and "0.0000" not in row


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


def flags(text):
    """By method, what its row ends with behind the seconds."""
    rows = [line for line in text.splitlines() if line.startswith(("ref ", "1 ", "2 ", "3 ", "- "))]
    return {row.split()[1]: " ".join(row.split()[11:]) for row in rows}


def test_scores_above_retrain_are_told_from_the_rows_where_records_do_not_say():
    records = [
        make("retrain", values=(0.9, 0.0, 0.5)),
        make("inverted", values=(0.9, 0.0, 0.3)),
        make("said", values=(0.9, 0.0, 0.3), above_retrain=False),
        make("worse", values=(0.8, 0.0, 0.5)),
        make("broken", values=None),
    ]
    above = flags(text := render(records))
    assert [method for method, said in above.items() if "above" in said] == ["inverted"]
    assert above["inverted"] == "above retrain"
    assert "above retrain: a higher unlearn_score than retraining has, which is not better forgetting" in text
    assert "above retrain" not in render(records[1:])
    lost = flags(render([records[0], make("inverted", 0, (0.9, 0.0, 0.3)), make("inverted", 1, None)]))
    assert lost["inverted"].endswith("above retrain 1/2")
    luckier = [*(make("retrain", s, (x, 0.0, 0.5)) for s, x in ((0, 0.7), (1, 0.9))), make("one", 1, (0.85, 0.0, 0.5))]
    assert "above retrain" not in render(luckier)  # of its own seed
    assert "above retrain" not in render([make("retrain", values=None), *records[1:]])
    assert "above retrain" not in render([records[0] | {"status": "untrained"}, *records[1:]])


def test_flags_are_counted_where_not_every_run_has_them_and_explained_where_they_occur():
    records = [
        make("scrub", 0, collapsed=True, inverted_membership=True, above_retrain=False, output_mask=False),
        make("scrub", 1, collapsed=True, inverted_membership=False, above_retrain=True, output_mask=False),
        make("scrub", 2, collapsed=True, inverted_membership=True, above_retrain=None, output_mask=None),
        make("masked", 0, output_mask=True),
    ]
    found = flags(text := render(records))
    assert found["scrub"] == "collapsed, inverted 2/3, above retrain 1/3" and found["masked"] == "like a mask"
    assert found["pretrained"] == ""
    for said in ("collapsed: ", "inverted: ", "above retrain: ", "like a mask: "):
        assert any(line.startswith(said) for line in text.splitlines())
    assert not any(line.startswith("like a mask: ") for line in render(records[:3]).splitlines())


def test_records_without_companions_and_flags_are_shown():
    old = make("scrub", 0)
    for key in ("companions", "flags", "unlearn_seed", "forget_mia_auc_augmented"):
        del old[key]
    assert line(render([old]), "scrub").split()[5:9] == ["-", "0.8000", "0.9667", "-"]
    both = summarize([old, make("scrub", 1, gap=0.2)], DEFAULTS)[1]
    assert both.mean["average_gap"] == 0.2 and "average_gap" not in both.half_width  # one seed knows it


def ranked(records):
    return {row.method: row.rank for row in summarize(list(records), {})}


def test_rows_that_the_seeds_cannot_tell_apart_share_a_rank():
    spread = (0.0, 0.05, 0.1)
    records = [make("best", seed, (0.8 + x, 0.0, 0.5)) for seed, x in enumerate(spread)]
    records += [make("near", seed, (0.8 + x, 0.0, 0.5)) for seed, x in enumerate(reversed(spread))]
    records += [make("steadily_behind", seed, (0.79 + x, 0.0, 0.5)) for seed, x in enumerate(spread)]
    assert ranked(records) == {"pretrained": None, "best": 1, "near": 1, "steadily_behind": 3}
    assert "Rows share a rank" in render(records)
    assert set(ranked(record for record in records if record["seed"] == 0).values()) == {None}


def test_references_are_marked_and_rank_nobody():
    values = {"retrain": 0.95, "output_mask": 0.94, "scrub": 0.9, "worse": 0.8}
    records = [make(method, seed, (x, 0.0, 0.5)) for method, x in values.items() for seed in range(2)]
    assert ranked(records) == {"pretrained": None, "retrain": None, "output_mask": None, "scrub": 1, "worse": 2}
    text = render(records)
    marks = [line(text, method).split()[0] for method in ("pretrained", *values)]
    assert marks == ["ref", "ref", "ref", "1", "2"] and "ref: a reference" in text
    dead = [record | {"status": "untrained"} if record["method"] == "retrain" else record for record in records]
    assert line(render(dead), "retrain").startswith("- ")


def test_a_rule_with_one_seed_left_is_named_as_not_ranked():
    records = [make("scrub", 0), make("scrub", 1), make("frail", 0), make("frail", 1, None)]
    assert "Of too few seeds to be ranked: frail" in render(records)
    assert (ranked(records)["scrub"], ranked(records)["frail"]) == (1, None)


def test_unlearnings_of_one_seed_are_averaged_before_seeds_are_compared():
    # Originals' means .5 and .7; within each .1 apart from its mean.
    values = {(0, 0): 0.4, (0, 1): 0.6, (1, 0): 0.6, (1, 1): 0.8}
    records = [make("scrub", seed, (x, 0.0, 0.5), unlearn_seed=j, collapsed=x < 0.5) for (seed, j), x in values.items()]
    text = render([*records, make("retrain", 0), make("retrain", 1)])
    row = line(text, "scrub")
    # t(.975, 1) = 12.7062 times .2 / 2
    assert row.split()[:3] == ["1", "scrub", "0.6000±1.2706"] and "2 (4 runs)" in row
    assert row.rstrip().endswith("collapsed 1/4")
    # Of a third of these values: S_w = .02 / 9, S_b = .04 / 9, so s_train = .1 / 3.
    tail = text[text.index("s_unlearn") :].splitlines()
    assert [row.split() for row in tail if "scrub" in row] == [["scrub", "0.0333", "0.0471"]]
    assert not any("retrain" in row for row in tail)
    assert "s_unlearn" not in render(records[::2])
    alone = render(records[:2])
    assert line(alone[alone.index("s_unlearn") :], "scrub").split() == ["scrub", "-", "0.0471"]
    assert "With one seed nothing is ranked." in alone and "±" not in alone


def test_seeds_of_given_weights_are_one_original():
    given = {"protocol": {"precision": "fp32", "init_weights": "9004c790"}}
    records = [make("scrub", s, (0.8 + 0.01 * j, 0.0, 0.5), unlearn_seed=j) | given for s in (0, 1) for j in (0, 1)]
    text = render(records)
    assert "Weights were given, so all seeds unlearn from one original" in text and "s_unlearn" in text
    assert "s_train" not in text
    assert "Weights were given" not in render([make("scrub", s) for s in (0, 1)])


def test_the_packages_own_rules_fit_one_line_of_a_file_each():
    records = []
    for seed in range(3):
        known = {"above_retrain": True, "inverted_membership": True, "output_mask": True, "collapsed": seed < 2}
        records += [make(name, seed, gap=0.1, **known) for name in ("negative_gradient", "retrain", "output_mask")]
        records.append(make("bad_teacher", seed, gap=0.1, hyperparameters={"reset_bn": True}))
    text = render(records)
    said = "collapsed 2/3, inverted, above retrain, like a mask"
    assert len([row for row in text.splitlines() if row.rstrip().endswith(f" 0.1000±0.0000     3    11.5 {said}")]) == 2
    # Retrained models' distance from each other has no interval.
    assert line(text, "retrain").rstrip().endswith(f"±0.0000        0.1000     3    11.5 {said}")
    assert line(text, "bad_teacher reset_bn=True").split()[-3:] == ["0.1000±0.0000", "3", "11.5"]
    assert max(map(len, text.splitlines())) <= tables.FILE_WIDTH


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
    row = next(i for i, text in enumerate(lines) if text[5:].startswith("negative_gradient "))
    assert lines[row].split()[1:] == ["negative_gradient", "0.9000", "0.0000", "0.3000", "0.2900", "0.8667", "0.8333"]
    assert lines[row + 1].split() == ["±0.0000"] * 6
    assert lines[row + 2].split()[1:] == ["bad_teacher", "diverged", *"-----"]
    assert lines[row + 3].split() == ["reset_bn=True"]
    row = next(i for i, text in enumerate(lines) if text.startswith("negative_gradient "))  # of the table below
    assert lines[row].split() == ["negative_gradient", "-", "3", "11.5", "above", "retrain"]
    assert lines[row + 1].split()[:5] == ["bad_teacher", "-", "3", "of", "3"]
    assert lines[row + 2].split() == ["reset_bn=True", "diverged"]


def test_ascii_output():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tables.print_results([make("scrub", s) for s in range(2)], defaults=DEFAULTS, members=5, non_members=5, file=file)
    file.seek(0)
    assert "+-0.0000" in file.read()


def test_a_collapsed_seed_is_counted_and_averaged():
    fine = make("scrub", 1, (0.9, 0.0, 0.5), collapsed=False)
    collapsed = make("scrub", 2, (0.5, 0.0, 0.5), collapsed=True)
    row = line(render([fine, collapsed]), "scrub")
    assert "0.7000" in row and "collapsed 1/2" in row
    assert "collapsed" not in line(render([fine]), "scrub")
