"""Figures show what records say, and are left out where they say nothing."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from example_record import diverged_record, example_record

from jaxunlearn.results.boards import boards

pytest.importorskip("matplotlib")

from jaxunlearn.report.plots import audit_plots, board_plots, run_plots, speed_plots
from jaxunlearn.report.plots_run import class_names

RESULTS = Path(__file__).parent.parent / "results"


def named(plots):
    assert len({plot.name for plot in plots}) == len(plots)
    assert all(re.fullmatch("[a-z0-9-]+", plot.name) for plot in plots)
    return {plot.name: plot for plot in plots}


def ten_classes(**changes):
    """A record of CIFAR-10 as it would be, with its ten classes."""
    record = example_record()
    for evaluation, accuracies in ((record, [k / 10 for k in range(10)]), (record["before"], [0.9] * 10)):
        answers = {"train": [10, 25, 15, *[0] * 7], "test": [1, 6, 3, *[0] * 7]}
        evaluation["companions"] |= {"class_acc": accuracies, "forgotten_as": answers}
    return record | changes


def lines(plot, axes=0):
    """{label: (x, y)} of the lines of a figure."""
    return {line.get_label(): line.get_data() for line in plot.figure.axes[axes].lines}


def board_of(*records):
    (board,) = boards(records)
    return board


def board():
    """Of two rules and two references, two seeds each."""
    return board_of(
        *(
            example_record(method=method, seed=seed, retain_acc=kept + 0.01 * seed, hyperparameters={})
            for method, kept in (("scrub", 0.8), ("salun", 0.7), ("retrain", 0.9), ("output_mask", 0.92))
            for seed in (0, 1)
        )
    )


def test_a_board_shows_each_method_with_its_interval():
    figure = named(board_plots(board()))["accuracies"].figure
    rules, references = figure.axes[0].containers
    (points, _, (across, up)) = rules
    assert points.get_xydata() == pytest.approx(np.array([[0.1, 0.805], [0.1, 0.705]]))
    assert [len(bars.get_segments()) for bars in (across, up)] == [2, 2]
    half = np.ptp(up.get_segments()[0][:, 1]) / 2
    assert half == pytest.approx(12.706 * 0.005, rel=1e-3)  # t of one degree of freedom, of two seeds
    assert len(references[0].get_xydata()) == 3 and references.get_label() == "references"
    assert points.get_marker() != references[0].get_marker()
    assert {text.get_text() for text in figure.axes[0].texts} == {
        "scrub",
        "salun",
        "retrain",
        "output_mask",
        "pretrained",
    }


def test_published_rows_stand_hollow_beside_an_official_board():
    record = json.loads((RESULTS / "resnet20-cifar10-class0/scrub/seed42.json").read_text())
    from jaxunlearn.results import schema
    from jaxunlearn.results.published import rows_of

    plot = named(board_plots(board_of(schema.upgrade(record))))["accuracies"]
    (line,) = [line for line in plot.figure.axes[0].lines if line.get_label() == "published"]
    assert len(line.get_xdata()) == len(rows_of("resnet20-cifar10-class0"))
    assert line.get_markerfacecolor() == "#ffffff"
    assert "published" in [text.get_text() for text in plot.figure.legends[0].texts]


def test_a_board_shows_how_far_each_method_is_from_retrain_and_retrains_own_distance():
    records = [example_record(method=method, hyperparameters={}) for method in ("scrub", "salun", "retrain")]
    for record, gap in zip(records, (0.3, 0.1, 0.05), strict=True):
        record["companions"]["against_retrain"] |= {"average_gap": gap, "js": gap / 2}
    plots = named(board_plots(board_of(*records)))
    for name, scale in (("average-gap", 1), ("js", 0.5)):
        axes = plots[name].figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["salun", "scrub"]  # the nearest above
        assert [container[0].get_xydata()[0].tolist() for container in axes.containers] == [
            [0.1 * scale, 0],
            [0.3 * scale, 1],
        ]
        assert lines(plots[name])["retrain to another retrain"][0][0] == 0.05 * scale
    assert "salun 0.100, scrub 0.300" in plots["average-gap"].text and "0.050 apart" in plots["average-gap"].text


def test_a_board_shows_the_areas_of_all_attacks():
    shown = lines(named(board_plots(board_of(example_record())))["areas"])
    values = {name: x[-1] for name, (x, _) in shown.items() if not name.startswith("_")}
    assert values == {
        "confidence": 0.55,
        "confidence, augmented": 0.53,
        "entropy": 0.56,
        "modified entropy": 0.6,
        "true probability": 0.61,
    }


def test_a_board_shows_seconds_the_shortest_first():
    slow, fast = example_record(method="scrub", hyperparameters={}), example_record(method="salun", hyperparameters={})
    slow["timing"]["unlearn_s"] = 2000.0
    plot = named(board_plots(board_of(slow, fast)))["seconds"]
    assert [line.get_xydata().tolist() for line in plot.figure.axes[0].lines] == [[[27.0, 0]], [[2007.0, 1]]]
    assert "salun 27, scrub 2.01e+03" in plot.text


def test_a_board_of_runs_that_all_diverged_shows_what_they_began_with():
    assert board_plots(board_of(diverged_record(before=None))) == []
    assert "scrub" not in named(board_plots(board_of(diverged_record())))["accuracies"].text


def test_what_the_confidences_were_and_are_is_seen_as_shares():
    plot = named(run_plots([ten_classes()]))["confidences"]
    before, after = plot.figure.axes
    assert (before.get_title("left"), after.get_title("left")) == ("before", "after")
    members, others = (patch.get_data().values for patch in after.patches)
    assert members[-2:].tolist() == [0.4, 0.6] and members.sum() == 1
    assert others.tolist() == [0.0] * 19 + [1.0]
    assert "after 0.600 of members" in plot.text


def test_the_attacks_curve_has_its_area_and_those_of_before_and_retrain():
    retrain = ten_classes(method="retrain", forget_mia_auc=0.51)
    shown = lines(named(run_plots([ten_classes()], [retrain]))["roc"])
    assert {"after, area 0.550", "before, area 0.550", "retrain, area 0.510", "chance, area .5"} == set(shown)
    assert np.allclose(shown["after, area 0.550"], np.linspace(0, 1, 101))


def test_the_curves_of_training_are_means_over_the_seeds_that_have_a_number():
    other = ten_classes(seed=1)
    other["curves"]["pretrain"] = {"loss": [0.5, 0.1], "accuracy": [0.6, 1.0]}
    plots = named(run_plots([ten_classes(), other]))
    assert lines(plots["pretraining"])["loss"][1].tolist() == pytest.approx([1.0, 0.4])
    assert lines(plots["pretraining"], 1)["accuracy"][1].tolist() == pytest.approx([0.5, 0.9])
    unlearned = lines(plots["unlearning"])
    assert unlearned["retain_loss"][0].tolist() == [1, 2] and np.isnan(unlearned["forget_loss"][1][1])
    assert "loss 1 to 0.4" in plots["pretraining"].text and "forget_loss 1 to 1" in plots["unlearning"].text


def test_a_loss_that_explodes_leaves_a_figure():
    record = ten_classes()
    record["curves"]["unlearn"] = {"loss": [1.0, -1e30, 10**300, None], "_hidden": [1.0, 2.0, 3.0, 4.0]}
    plot = named(run_plots([record]))["unlearning"]
    assert plot.figure.axes[0].get_yscale() == "symlog"
    assert [text.get_text().strip() for text in plot.figure.axes[0].get_legend().texts] == ["loss", "_hidden"]
    record["curves"] = {"pretrain": None, "unlearn": {"": [1.0]}, "evaluated": None}
    assert "unlearning" in named(run_plots([record]))


def test_what_the_model_was_worth_on_the_way_is_shown_by_epoch():
    plot = named(run_plots([ten_classes()]))["on-the-way"]
    shown = lines(plot)
    assert set(shown) == {"retained classes", "forgotten class", "attack's area", "official score", "symmetric score"}
    assert [values.tolist() for values in shown["forgotten class"]] == [[0, 2], [0.9, 0.1]]
    assert "forgotten class 0.900 to 0.100" in plot.text


def test_the_accuracies_of_few_classes_are_shown_by_name():
    plot = named(run_plots([ten_classes()]))["classes"]
    axes = plot.figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()][:3] == ["airplane *", "automobile", "bird"]
    shown = lines(plot)
    assert shown["before"][0].tolist() == pytest.approx([0.9] * 10)
    assert shown["after"][0].tolist() == pytest.approx([k / 10 for k in range(10)])
    assert "airplane, which was to be forgotten, 0.900 before and 0.000 after" in plot.text
    assert "most automobile, by -0.800" in plot.text


def test_of_many_classes_the_sorted_differences_are_shown_and_the_forgotten_one_marked():
    record = ten_classes()
    record["protocol"] |= {"dataset": "cifar100"}
    for evaluation, accuracy in ((record, [0.0, *[0.5] * 98, 0.2]), (record["before"], [0.8, *[0.6] * 99])):
        evaluation["companions"] |= {
            "class_acc": accuracy,
            "forgotten_as": {"train": [3, *range(99)], "test": [1, *[0] * 99]},
        }
    plots = named(run_plots([record]))
    shown = lines(plots["classes"])
    assert [values[0] for values in shown["apple, forgotten"]] == [0, pytest.approx(-0.8)]
    assert shown["all classes"][1][:3] == pytest.approx([-0.8, -0.4, -0.1])
    answers = plots["answers"].figure.axes[0]
    assert [text.get_text() for text in answers.get_yticklabels()][:2] == ["worm", "woman"]
    assert len(answers.get_yticklabels()) == 11 and answers.get_yticklabels()[-1].get_text() == "others"
    assert sum(bar.get_width() for bar in answers.containers[0]) == pytest.approx(1)


def test_where_forgotten_images_go_is_shown_largest_first():
    plot = named(run_plots([ten_classes()]))["answers"]
    axes = plot.figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["automobile", "bird", "airplane *"]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]
    assert "automobile 0.500, bird 0.300, airplane 0.200" in plot.text


def test_relearning_stands_beside_retrains():
    retrain = ten_classes(method="retrain")
    retrain["companions"]["full"]["relearning"] = [0.0] * 11
    plot = named(run_plots([ten_classes()], [retrain]))["relearning"]
    shown = lines(plot)
    assert shown["after"][1].tolist() == ten_classes()["companions"]["full"]["relearning"]
    assert shown["retrain"][1].tolist() == [0.0] * 11 and "before" not in shown
    assert "after 0.550, retrain 0.000" in plot.text


def test_what_a_record_does_not_say_is_left_out():
    old = ten_classes()
    old["companions"] |= {"roc": None, "full": None}
    old["curves"] = {"pretrain": None, "unlearn": None, "evaluated": None}
    assert set(named(run_plots([old]))) == {"confidences", "classes", "answers"}
    assert set(named(run_plots([ten_classes(companions=None, before=None)]))) == {
        "pretraining",
        "unlearning",
        "on-the-way",
    }
    first = diverged_record(before=None, curves={"pretrain": None, "unlearn": None, "evaluated": None})
    assert run_plots([first]) == [] and run_plots([]) == [] and audit_plots([]) == []


def test_runs_that_failed_are_no_part_of_a_mean():
    failed = ten_classes(seed=1, status="untrained", untrained_in="pretrain")
    failed["curves"]["pretrain"]["loss"] = [100.0, 100.0]
    assert lines(named(run_plots([failed, ten_classes()]))["pretraining"])["loss"][1].tolist() == [1.5, 0.7]
    reference = ten_classes(method="retrain", status="untrained", untrained_in="unlearn")
    assert not [name for name in lines(named(run_plots([ten_classes()], [reference]))["roc"]) if "retrain" in name]


def test_a_record_that_contradicts_itself_leaves_its_plot_out():
    wrong = ten_classes(seed=1)
    wrong["companions"]["class_acc"] = [0.5, 0.5]
    wrong["curves"]["evaluated"]["retain_acc"] = [0.5]
    shown = lines(named(run_plots([ten_classes(), wrong]))["classes"])
    assert shown["after"][0].tolist() == pytest.approx([k / 10 for k in range(10)])
    elsewhere = ten_classes()
    elsewhere["protocol"]["forget_class"] = 77
    assert "classes" not in named(run_plots([elsewhere]))


def test_classes_have_names_where_they_are_known():
    assert class_names("fashion_mnist", 10)[0] == "T-shirt/top" and class_names("cifar100", 100)[-1] == "worm"
    assert class_names("cifar10", 3) == class_names("of somebody's", 3) == ["0", "1", "2"]


def audits():
    """Of the rules that were audited with one set of originals."""
    folder = RESULTS / "audit/resnet20-digits-class0"
    methods = ("output_mask", "retain_finetune", "scrub")
    return [json.loads((folder / f"{method}-N32.json").read_text()) for method in methods]


def test_audits_show_the_curves_between_untouched_and_retrained_models():
    records = audits()
    plots = named(audit_plots(records))
    assert set(plots) == {"ulira-true-class", "ulira-retained", "rmia-true-class", "rmia-retained", "areas"}
    shown = lines(plots["ulira-true-class"])
    rows = ["(untouched)", "output_mask", "retain_finetune", "scrub", "(retrain halved)"]
    assert list(shown) == [*rows, "chance"]
    curve = records[2]["attacks"]["unlearned"]["true_class"]["ulira"]["curve"]
    assert shown["scrub"][1] == pytest.approx(np.maximum(curve, 5e-5))
    areas = plots["areas"].figure.axes[0]
    assert [text.get_text() for text in areas.get_yticklabels()] == rows
    found = [records[0]["attacks"]["pretrained"], *(record["attacks"]["unlearned"] for record in records)]
    found = [each["true_class"]["ulira"] for each in [*found, records[0]["attacks"]["retrained"]]]
    points, _, (bars,) = areas.containers[0]
    assert points.get_xdata().tolist() == [each["auc"] for each in found]
    assert [np.ptp(segment[:, 0]) / 2 for segment in bars.get_segments()] == pytest.approx(
        [each["auc_half_width"] for each in found]
    )
    assert f"scrub {found[3]['auc']:.3f}" in plots["areas"].text


def test_an_audit_of_too_few_models_has_no_curves():
    record = copy.deepcopy(audits()[0])
    for attacks in record["attacks"].values():
        for statistic in ("true_class", "retained"):
            attacks[statistic] |= {"ulira": None, "rmia": None}
    assert audit_plots([record]) == []


def test_speed_is_shown_as_ratios_with_their_range():
    record = json.loads((RESULTS / "speed/resnet20-cifar10-class0.json").read_text())
    rows = record["quantities"]
    rows["pretrain"] |= {"ours": 1210.6, "torch": 1080.9}
    rows["bad_teacher"]["ratio"] = 0.951
    (plot,) = speed_plots(record)
    axes = plot.figure.axes[0]
    assert [bar[0].get_xdata()[0] for bar in axes.containers] == [row["ratio"] for row in rows.values()]
    pairs = [a / b for a, b in zip(rows["scrub"]["ours_bursts"], rows["scrub"]["torch_bursts"], strict=True)]
    (segment,) = axes.containers[4][2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([min(pairs), max(pairs)])
    assert "1,211 : 1,081 images/s" in axes.get_yticklabels()[0].get_text() and "bad_teacher 0.95" in plot.text
    assert speed_plots(record | {"against": None}) == []


def test_seeds_that_were_looked_at_after_other_epochs_are_drawn_where_all_were():
    def seen(*epochs):
        names = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score", "symmetric_score")
        evaluated = {"epoch": list(epochs)} | {name: [1 - epoch / 5 for epoch in epochs] for name in names}
        return example_record(curves=example_record()["curves"] | {"evaluated": evaluated})

    (plot,) = [one for one in run_plots([seen(0, 1, 2, 3, 4), seen(0, 2, 4)]) if one.name == "on-the-way"]
    line = plot.figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 2, 4] and line.get_ydata() == pytest.approx([1, 0.6, 0.2])
