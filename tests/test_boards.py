"""Boards: which records belong together, what a row says, and what is published beside it."""

import pytest
from example_record import diverged_record, example_record

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.evaluation.metrics import auc_standard_error
from jaxunlearn.registry import names
from jaxunlearn.results import boards as made
from jaxunlearn.results.published import log_density
from jaxunlearn.results.sheets import Estimate

RESNET, VGG, DIGITS = "resnet20-cifar10-class0", "vgg16bn-cifar100-class0", "resnet20-digits-class0"
SCRUB = {"temperature": 4.0, "gamma": 0.99, "alpha": 0.01, "forget_epochs": 2}


def record(
    method="scrub", seed=0, bench=RESNET, values=None, protocol=None, device=None, make=example_record, **changes
):
    """A record of a benchmark's own protocol but for the fields in `protocol`."""
    own = BENCHMARKS[bench]
    fields = {**vars(own), "mean": list(own.mean), "std": list(own.std)} | (protocol or {})
    new = make(method=method, bench=bench, seed=seed, hyperparameters={}, protocol=fields) | (values or {})
    if device:
        new["environment"]["device_kind"] = device
    return new | changes


def areas(clean, augmented, tied=None):
    values = {"forget_mia_auc": clean, "forget_mia_auc_augmented": augmented}
    return values | {"forget_mia_auc_published": clean if tied is None else tied}


def test_benchmarks_protocols_and_devices_are_boards_of_their_own_official_ones_first():
    records = [
        record(bench=VGG),
        record(protocol={"pretrain_epochs": 8, "new_field": [1]}),
        record(protocol={"init_weights": "9004c790d0d2"}),
        record(),
        record(seed=1),
        record(device="NVIDIA H200", protocol={"precision": "tf32"}),
    ]
    found = made.boards(records)
    assert [(board.about["bench"], board.about["protocol"], len(board.records), board.official) for board in found] == [
        (RESNET, "the benchmark's own protocol", 2, True),
        (RESNET, "precision tf32, device NVIDIA H200", 1, True),
        (RESNET, "given weights 9004c790", 1, True),
        (RESNET, "pretrain_epochs 8, new_field [1]", 1, False),
        (VGG, "the benchmark's own protocol", 1, True),
    ]


@pytest.mark.parametrize(
    ("changes", "official"),
    [
        ({"resnet_shortcut": "A"}, False),
        ({"resnet_shortcut": "A", "init_weights": "0"}, True),  # the weights' own
        ({"flip": False}, False),
        ({"unlearn_epochs": 1, "init_weights": "0"}, False),
    ],
)
def test_published_rows_stand_beside_the_official_protocol_alone(changes, official):
    (board,) = made.boards([record(protocol=changes)])
    assert board.official is official
    labels = {row["published"] for row in made.results(board).rows} - {None}
    assert (
        bool(labels) is official and bool(made.verdicts(board)) is official and bool(made.readings(board)) is official
    )
    assert any("Published rows" in note for note in made.results(board).notes) is official
    assert ({row["published"] for row in made.short(board).rows} == {None, "0.8115"}) is official


def test_published_areas_may_be_held_against_those_of_augmented_members():
    (board,) = made.boards([record(protocol={"mia_augment": True}, values={"forget_mia_auc_published": 0.44})])
    ours = {row["quantity"]: row["ours"] for row in made.verdicts(board).rows}
    assert board.about["protocol"] == "mia_augment true" and ours["forget_mia_auc"] == 0.44
    assert made.readings(board) is None  # of the records that say both


def test_a_published_row_is_held_against_single_unlearnings():
    own = [{"unlearn_seed": j, "retain_acc": 0.88 + 0.1 * j} for j in (0, 1)]
    records = [record(seed=seed, values=values) for seed in range(3) for values in own]
    (board,) = made.boards(records)
    (row,) = (row for row in made.verdicts(board).rows if row["quantity"] == "retain_acc")
    assert (row["ours"], row["seeds"]) == (pytest.approx(0.88), 3)
    assert next(row for row in made.short(board).rows if row["method"] == "scrub")["runs"] == 6


def test_the_short_table_counts_the_seeds_that_failed():
    failed = [record(seed=seed, make=diverged_record) for seed in (1, 2)]
    (board,) = made.boards([record(), *failed])
    row = next(row for row in made.short(board).rows if row["method"] == "scrub")
    assert (row["seeds"], row["diverged"]) == (3, 2)


def test_what_came_of_other_images_is_a_board_of_its_own_that_nothing_is_published_for():
    other = {"digest": "0123456789abcdef", "verified": False}
    unknown = {"digest": None, "verified": None}  # of records from before
    records = [record(seed=0), record(seed=1, dataset=unknown), record(seed=2, dataset=other)]
    found = made.boards(records)
    assert [(board.about["protocol"], len(board.records), board.official) for board in found] == [
        ("the benchmark's own protocol", 2, True),
        ("images 0123456789abcdef", 1, False),
    ]


def test_a_row_says_all_that_its_records_do():
    rows = [record(seed=seed, hyperparameters=SCRUB, command=f"run {seed}") for seed in (0, 1)]
    rows.append(record(seed=2, hyperparameters=SCRUB, make=diverged_record))
    (board,) = made.boards([*rows, record("mine", hyperparameters={"a": 1}, command=None)])
    _, shown, mine = made.results(board).rows[:3]
    assert shown["retain_acc"] == Estimate(0.9, 0.0) and shown["tug_of_war"] == Estimate(0.7, 0.0)
    expected = {"rank": 1, "method": "scrub", "variant": "", "seeds": 3, "diverged": 1, "untrained": None}
    expected |= {"reads": "retain, forget images", "hardware": ("a processor, 2 cores",), "seconds": 27.0}
    assert {name: shown[name] for name in expected} == expected
    assert shown["commands"] == ("run 0", "run 1", rows[2]["command"]) and shown["runs"] is None
    assert (mine["variant"], mine["reads"], mine["commands"], mine["rank"]) == ("a=1", None, (), None)


def test_of_several_variants_of_somebodys_rule_what_differs_is_shown():
    settings = [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 2, "b": "x", "c": 0}]
    (board,) = made.boards([record("mine", hyperparameters=own) for own in settings])
    assert {row["variant"] for row in made.results(board).rows} - {"", None} == {"a=1", "a=2", "a=2 c=0"}


def test_a_model_that_collapsed_is_marked_where_the_first_records_did_not_say_so():
    unknown = dict.fromkeys(("collapsed", "inverted_membership", "above_retrain", "output_mask"))
    cases = {
        "a": {"retain_acc": 0.79},  # before it was .9
        "b": {"retain_acc": 0.81},
        "c": {"retain_acc": 0.1, "before": None},
        "d": {"retain_acc": 0.1, "flags": unknown | {"collapsed": False}},
    }
    records = [record(name, values={"flags": unknown} | values) for name, values in cases.items()]
    (board,) = made.boards([*records, record("e", make=diverged_record)])
    flags = {row["method"]: row["flags"] for row in made.results(board).rows}
    assert [flags[name] for name in "abcde"] == [["collapsed"], [], [], [], []]


def test_hyperparameters_in_a_file_are_lists_and_still_the_rules_own():
    (board,) = made.boards([record("importance_masked", hyperparameters={"ascent": [0.3, 0.24, 0.15]})])
    assert made.results(board).rows[1]["variant"] == ""
    (row, *_) = made.verdicts(board).rows
    assert row["row"] == "agent: deepseek-reasoner"


def test_rules_of_others_that_share_a_name_are_rows_of_their_own():
    digests = ("a" * 64, "b" * 64, None)
    records = [record("mine", rule_digest=digest) for digest in digests]
    records += [record("scrub", seed, rule_digest=digest * 64) for seed, digest in enumerate("ab")]
    (board,) = made.boards(records)
    found = {row["method"] for row in made.results(board).rows if row["published"] is None}
    assert found == {"pretrained", "mine aaaaaaaa", "mine bbbbbbbb", "mine None", "scrub"}
    (board,) = made.boards(records[:1])
    assert made.results(board).rows[1]["method"] == "mine"


def test_seeds_of_several_versions_of_a_rule_are_said_to_be():
    mixed = [record("scrub", seed, rule_digest=digest * 64) for seed, digest in enumerate("ab")]
    alike = [record("ssd", seed, rule_digest="c" * 64) for seed in range(2)]
    apart = [record("munba", 0, rule_digest=d * 64, hyperparameters={"max_norm": d}) for d in "de"]
    (board,) = made.boards([*mixed, *alike, *apart, record("scrub", 2, rule_digest=None)])
    (note,) = [note for note in made.results(board).notes if "version" in note]
    assert note == "Seeds of scrub are of more than one version of its code." and note in made.short(board).notes


def test_given_weights_are_said_to_be_one_original():
    given = {"init_weights": "0" * 64}
    (board,) = made.boards([record(seed=seed, protocol=given) for seed in range(3)])
    for sheet in (made.results(board), made.verdicts(board), made.readings(board)):
        assert any("one original" in note for note in sheet.notes)
    (board,) = made.boards([record(seed=seed) for seed in range(3)])
    assert not any("one original" in note for note in made.verdicts(board).notes)


def test_a_verdict_takes_three_seeds_the_rules_own_settings_and_a_model_that_learned():
    values = [{"retain_acc": 0.88 + 0.002 * seed, "forget_acc": 0.0} for seed in range(3)]
    three = [record(seed=seed, values=one, hyperparameters=SCRUB) for seed, one in enumerate(values)]
    two = [record("bad_teacher", seed) for seed in (0, 1)]
    other = [record("retain_finetune", hyperparameters={"x": 1}), record("negative_gradient", make=diverged_record)]
    (board,) = made.boards([*three, *two, *other])
    found = {(row["method"], row["quantity"]): row for row in made.verdicts(board).rows}
    assert {method for method, _ in found} == {"scrub", "bad_teacher"}
    near, far = found["scrub", "retain_acc"], found["scrub", "forget_acc"]  # published .8787 and .005
    assert near["difference"] == pytest.approx(0.0033) and near["allowed"] == pytest.approx(0.00999, abs=1e-4)
    assert (near["agrees"], far["agrees"]) == ("yes", "no")
    assert found["bad_teacher", "forget_mia_auc"]["agrees"] == "needs 3 seeds"


def test_the_official_score_and_area_are_compared_by_the_published_tie_rule():
    (board,) = made.boards([record(values={"forget_mia_auc_published": 0.3, "unlearn_score_published": 0.7})])
    ours = {row["quantity"]: row["ours"] for row in made.verdicts(board).rows}
    assert (ours["forget_mia_auc"], ours["unlearn_score"]) == (0.3, 0.7)


def test_a_row_that_is_no_measurement_has_no_verdict_and_no_reading():
    bench = "mobilenetv2-fmnist-class0"
    (board,) = made.boards([record("bad_teacher", seed, bench) for seed in range(3)])
    assert {row["agrees"] for row in made.verdicts(board).rows} == {"not a measurement"}
    assert made.readings(board).rows[0]["left out"] == "not a measurement"
    assert {row["published"] for row in made.short(board).rows} == {None}


def test_readings_are_summed_over_the_rules_that_tell():
    # Published: scrub .4393, retain_finetune .4512: what augmented images give here.
    ours = {"scrub": (0.55, 0.44), "retain_finetune": (0.56, 0.45)}
    records = [
        record(method, seed, values=areas(clean + 0.01 * seed, augmented + 0.01 * seed))
        for method, (clean, augmented) in ours.items()
        for seed in range(-1, 2)
    ]
    records += [record("negative_gradient", seed, values=areas(0.5, 0.5, tied=0.1)) for seed in range(3)]
    records += [record("bad_teacher", seed) for seed in range(2)]
    sheet = made.readings(made.boards(records)[0])
    found = {row["method"]: row for row in sheet.rows}
    floor = auc_standard_error(5000, 1000)
    expected = log_density([0.54, 0.55, 0.56], 0.4393, floor), log_density([0.43, 0.44, 0.45], 0.4393, floor)
    scrub = found["scrub"]["log density, clean"], found["scrub"]["log density, augmented"]
    assert scrub == pytest.approx(expected)
    for reading in ("log density, clean", "log density, augmented"):
        parts = found["scrub"][reading] + found["retain_finetune"][reading]
        assert found["sum"][reading] == pytest.approx(parts)
    assert found["negative_gradient"]["left out"] == "ties decide"
    assert found["bad_teacher"]["left out"].startswith("needs 3 seeds with an area of clean and")
    assert sheet.notes == ["What this decides: augmented images of the members."]


def test_both_readings_are_of_the_same_seeds():
    clean = {0: 0.55, 1: 0.56, 2: 0.57, 3: 0.1, 4: 0.9}
    records = [record(seed=seed, values=areas(area, 0.44 if seed < 3 else None)) for seed, area in clean.items()]
    row = made.readings(made.boards(records)[0]).rows[0]
    floor = auc_standard_error(5000, 1000)
    assert (row["seeds"], row["clean images"]) == (3, pytest.approx(0.56))
    assert row["log density, clean"] == pytest.approx(log_density([0.55, 0.56, 0.57], 0.4393, floor))
    apart = [record(seed=seed, values=areas(0.5, None), companions=None) for seed in range(3)]
    apart += [record(seed=seed, values=areas(None, 0.5, tied=0.5), companions=None) for seed in range(3, 6)]
    row = made.readings(made.boards(apart)[0]).rows[0]
    assert row["left out"] == "needs 3 seeds with an area of clean and of augmented images"


def test_without_three_seeds_nothing_is_decided():
    old = [record(seed=seed, values=areas(0.4, None)) for seed in range(3)]
    sheet = made.readings(made.boards(old)[0])
    assert sheet.rows[0]["left out"] == "needs 3 seeds with an area of augmented images"
    assert (
        len(sheet.rows) == 1
        and sheet.rows[0]["log density, clean"] is None
        and sheet.notes == ["What this decides: undecided."]
    )


def test_nothing_is_published_of_the_digits():
    (board,) = made.boards([record(bench=DIGITS)])
    assert made.verdicts(board) is None and made.readings(board) is None
    assert {row["published"] for row in made.results(board).rows} == {None}


def test_the_table_of_rules_has_all_of_them_and_no_empty_cell():
    rows = made.rules().rows
    assert [row["rule"] for row in rows] == names() and all(all(row.values()) for row in rows)
