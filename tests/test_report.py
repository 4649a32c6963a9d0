"""The report's page and command, without a browser: what is in it, and what becomes of strangers' files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from example_record import diverged_record, example_record
from test_gathering import put

from jaxunlearn.commands.main import script
from jaxunlearn.errors import UserError
from jaxunlearn.report import gathering, pages, thumbnails, writing

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """What a page's elements are, whether all are closed, and what is to be read."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.handlers, self.tags, self.open, self.words = [], [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            {"id": self.ids, "href": self.links, "src": self.sources}.get(name, []).append(value)
            self.handlers += [name] if name.startswith("on") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag) if tag not in VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """Makes a report of records: its page, and what was said."""
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)

    def make(*records, arguments=(), status=0):
        for i, record in enumerate(records):
            put(tmp_path / "runs" / f"{i}" / f"seed{i}.json", record)
        out = tmp_path / "report.html"
        given = ["report", [str(tmp_path / "runs"), *arguments, "--out", str(out), "--cache-dir", str(tmp_path)]]
        assert script(*given) == status
        said = capsys.readouterr()
        return (Page(out.read_text()), said.err) if status == 0 else (None, said.err)

    return make


def test_a_page_has_what_the_records_say(report):
    seeds = [example_record(seed=seed, retain_acc=0.9 + seed / 100) for seed in (1, 2, 3)]
    page, said = report(*seeds, example_record(method="retrain", seed=1), diverged_record(method="salun"))
    assert said == ""
    for words in ("scrub", "salun", "diverged", "0.9200 ±", "jaxunlearn bench --bench", "temperature", "above retrain"):
        assert words in page.text, words
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links) and not page.sources


def test_a_page_is_the_same_for_the_same_records(tmp_path):
    put(tmp_path / "runs" / "seed0.json", example_record())
    found = gathering.gather([tmp_path / "runs"])
    assert pages.make_page(found, {}) == pages.make_page(found, {})


BESIDE = {
    "unit": "images/s",
    "ours": 2.0,
    "torch": 1.0,
    "ratio": 2.0,
    "ours_bursts": [2.0, 2.0],
    "torch_bursts": [1.0, 1.0],
}
SPEED = {
    "bench": "resnet20-cifar10-class0",
    "precision": "fp32",
    "against": None,
    "pairs": 2,
    "seeds": 1,
    "environment": {"device_kind": "cpu"},
}
EVIL = "<script>alert(1)</script>'\"`$x_{y}$ javascript:alert(1) \u202e\x1b[31m\x00"


def test_text_of_strangers_is_text(report):
    record = example_record(method=EVIL, command=EVIL, hyperparameters={EVIL: [EVIL]})
    record["environment"]["cpu"]["model"] = record["protocol"]["more"] = record["environment"]["versions"][EVIL] = EVIL
    record["environment"]["device_kind"] = EVIL * 500
    page, _ = report(record)
    assert page.tags.count("script") == 1 and page.handlers == [] and "<script>alert(1)" in page.text
    assert (found := re.search(r".{50}[\x00-\x08\x1b\u202a-\u202e]", page.text)) is None, found


def test_what_is_no_record_is_named_and_left_out(report, tmp_path):
    put(tmp_path / "runs" / "audit" / "x" / "scrub-N4.json", b"{}")
    put(tmp_path / "runs" / "speed" / "x.json", json.dumps({"bench": 1, "quantities": {}}).encode())
    page, said = report(example_record(), b"{")
    assert "scrub" in page.text
    assert len(said.splitlines()) == 3 and all(
        line.startswith("warning: cannot read the ") for line in said.splitlines()
    )


@pytest.mark.parametrize(
    "record",
    [
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 0}}},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": True}}},
        {"quantities": {"pretrain": {"unit": 1, "ours": 1.0}}},
        {"quantities": {"pretrain": []}},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 1.0}}, "against": "torch"},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 1.0}}, "bench": "none"},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 1.0}}, "bench": []},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 1.0}}, "pairs": "5"},
        {"quantities": {"pretrain": {"unit": "images/s", "ours": 1.0}}, "environment": {}},
        {"quantities": {"pretrain": BESIDE | {"torch_bursts": [1.0]}}, "against": "torch"},
        {"quantities": {"pretrain": BESIDE | {"torch_bursts": [1.0, 0]}}, "against": "torch"},
        {"quantities": {"pretrain": BESIDE | {"ours_bursts": [], "torch_bursts": []}}, "against": "torch"},
    ],
)
def test_what_is_no_record_of_speed(tmp_path, record):
    whole = SPEED | record
    found = gathering.gather([put(tmp_path / "x.json", whole)])
    assert found.speeds == [] and len(found.refused) == 1 and "cannot read the record of speed" in found.refused[0]


def test_an_audit_of_a_rule_whose_name_begins_like_a_run_is_one(tmp_path):
    record = json.loads((ROOT / "results/audit/resnet20-digits-class0/scrub-N32.json").read_text())
    put(tmp_path / "audit" / "resnet20-digits-class0" / "seed_noise-N32.json", record | {"method": "seed_noise"})
    found = gathering.gather([tmp_path])
    assert [one["method"] for one in found.audits] == ["seed_noise"] and found.refused == []


def test_folders_above_and_rules_names_make_no_speed_of_a_run(tmp_path):
    record = example_record()
    put(tmp_path / "speed" / "runs" / "resnet20" / "scrub" / "seed0.json", record)
    put(tmp_path / "runs" / "resnet20" / "speed" / "seed0.json", record | {"method": "speed"})
    measured = json.loads((ROOT / "results/speed/resnet20-cifar10-class0.json").read_text())
    put(tmp_path / "measured" / "speed" / "resnet20.json", measured)
    for place, counts in {"speed/runs": (1, 0), "runs": (1, 0), "measured": (0, 1), "measured/speed": (0, 1)}.items():
        found = gathering.gather([tmp_path / place])
        assert (len(found.records), len(found.speeds)) == counts, place
        assert not [line for line in found.refused if "of speed" in line], place


def test_records_of_speed_are_told_apart_and_strangers_ones_are_drawn(tmp_path):
    odd = SPEED | {"precision": "\ud800", "quantities": {"\ud800": BESIDE | {"ratio": 9.0}}, "against": "torch"}
    changes = ({}, {"environment": {"device_kind": "a card"}}, {"seeds": 4})
    paths = [put(tmp_path / f"{i}.json", odd | change) for i, change in enumerate(changes)]
    found = gathering.gather(paths)
    page = Page(pages.make_page(found, {}).encode().decode())
    assert len(found.speeds) == 3 and len(page.ids) == len(set(page.ids))
    assert "fp32" not in page.text and "a card" in page.text and "4 seeds" in page.text


def test_audits_of_other_models_are_tables_of_their_own(tmp_path):
    record = json.loads((ROOT / "results/audit/resnet20-digits-class0/scrub-N32.json").read_text())
    others = [{"models": 64}, {"hyperparameters": {"temperature": 8.0}}, {"finished_at": "2099"}]
    others += [{"protocol": record["protocol"] | {"pretrain_epochs": 9}}]
    originals = record["attacks"]["pretrained"] | {"population_auc": 0.25}
    others += [{"method": "salun", "attacks": record["attacks"] | {"pretrained": originals}}]
    paths = [put(tmp_path / f"{i}.json", record | change) for i, change in enumerate([{}, *others])]
    page = Page(pages.make_page(gathering.gather(paths), {}))
    # 32, 64 and 32 other models, and another protocol; nobody stands beside the untouched originals of others.
    assert page.text.count("By the margin of the true class") == 4
    assert page.text.count("N = 32, set 2 of originals and retrained models") == 1 and "0.250" in page.text
    assert "scrub temperature=8.0" in page.text and "values at different N do not compare" in page.text
    assert len(page.ids) == len(set(page.ids))
    stranger = put(tmp_path / "x.json", record | {"environment": {}})
    assert "does not say what it was made on" in gathering.gather([stranger]).refused[0]


def test_audits_and_speeds_of_the_project_are_shown(report):
    speed = str(ROOT / "results" / "speed" / "resnet20-cifar10-class0.json")
    page, said = report(example_record(), arguments=[str(ROOT / "results" / "audit"), speed, speed])
    assert said == "" and "(untouched)" in page.text
    assert page.text.count("Rates of training steps") == 1 and "images/s" in page.text


def test_without_records_there_is_no_page(report):
    _, said = report(status=2)
    assert said.startswith("error: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [b"my thesis", b""])
def test_nothing_but_a_report_is_overwritten(report, tmp_path, content):
    (tmp_path / "report.html").write_bytes(content)
    _, said = report(example_record(), status=2)
    assert "is no report and is not overwritten" in said and (tmp_path / "report.html").read_bytes() == content
    (tmp_path / "report.html").unlink()
    report(example_record())
    page, _ = report(example_record(method="salun"))  # an earlier report is replaced
    assert "salun" in page.text


def test_twenty_rows_stay_small(tmp_path):
    beside = example_record()["companions"] | {"class_acc": [k / 100 for k in range(100)]}
    beside |= {"forgotten_as": {"train": list(range(100)), "test": list(range(100))}}
    curves = example_record()["curves"] | {"pretrain": {"loss": [1 / (k + 1) for k in range(80)]}}

    def size(rows):
        folder = tmp_path / f"{rows}"
        for k in range(rows):
            record = example_record(method=f"rule{k}", companions=beside, curves=curves)
            put(folder / f"{k}" / "seed0.json", record)
        return len(pages.make_page(gathering.gather([folder]), {}).encode())

    one, two = size(1), size(2)
    assert one + 19 * (two - one) < 2e6


def test_ids_are_told_apart():
    names = [("a", "b"), ("a b",), ("a-b",), ("A", "b"), ("a", "b", ""), ("a" * 100,), ("a" * 101,), ("ä",), ("ö",)]
    found = {pages.slug(*name) for name in names} | {pages.slug("a", "b", of="c")}
    assert len(found) == len(names) + 1 and all(re.fullmatch(r"[a-z0-9-]{1,70}", one) for one in found)


def digits():
    return thumbnails.datasets(["digits", "cifar10", "no such set"], None, Path("nowhere"))[0]


def test_where_a_folder_of_images_has_none_it_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    found, said = thumbnails.datasets(["digits", "cifar10"], tmp_path / "typo", tmp_path)
    assert [*found] == ["digits"] and said == [f"no pictures of cifar10: {tmp_path / 'typo'} does not exist"]
    assert thumbnails.datasets(["cifar10"], None, tmp_path) == ({}, [])


def test_pictures_are_of_the_class_that_is_answered_or_of_the_forgotten_images(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    assert list(digits()) == ["digits"]  # the others are not at hand, and that is no fault
    dataset = digits()["digits"]
    record = example_record()
    record["protocol"] |= {"dataset": "digits", "forget_class": 0, "train_limit": None, "validation": False}
    record["dataset"]["digest"] = dataset.digest
    zeros = dataset.train.images[dataset.train.labels == 0]
    record["companions"] |= {"class_acc": [0.5] * 10}
    record["companions"]["forgotten_as"] |= {"train": [0, 0, 100, 0, 0, 0, len(zeros) - 100, 0, 0, 0]}
    likely, other = thumbnails.answers(record, tmp_path / "none.npz", dataset)
    assert (likely.label, other.label, likely.own) == (2, 6, False) and len(likely.pictures) == thumbnails.EACH
    assert likely.pictures[0] == thumbnails._address(dataset.train.images[dataset.train.labels == 2][0])
    said = np.zeros((len(zeros), 10), np.float16)
    said[:100, 2] = said[100:, 6] = 1
    np.savez(tmp_path / "kept.npz", forget_train=said, finished_at=record["finished_at"])
    likely, other = thumbnails.answers(record, tmp_path / "kept.npz", dataset)
    assert likely.own and other.pictures[0] == thumbnails._address(zeros[100])
    odd = np.zeros((len(zeros), 10), [("a", np.float16)])
    for changed in (
        {"forget_train": said[1:]},
        {"finished_at": "then"},
        {"forget_train": said[:, :3]},
        {"forget_train": odd},
    ):
        np.savez(tmp_path / "kept.npz", **{"forget_train": said, "finished_at": record["finished_at"]} | changed)
        assert not thumbnails.answers(record, tmp_path / "kept.npz", dataset)[0].own
    (tmp_path / "kept.npz").write_bytes(b"PK")
    assert not thumbnails.answers(record, tmp_path / "kept.npz", dataset)[0].own
    assert thumbnails.answers(record, tmp_path, None)[0].pictures == []
    record["dataset"]["digest"] = "0123456789abcdef"  # the run saw other images
    assert thumbnails.answers(record, None, dataset)[0].pictures == []
    record["dataset"]["digest"] = dataset.digest
    assert thumbnails.answers(record | {"companions": None}, tmp_path / "kept.npz", dataset) == []  # of version 1


def test_a_page_shows_pictures_with_the_names_of_classes(tmp_path):
    record = example_record()
    record["protocol"]["dataset"] = "digits"
    record["dataset"]["digest"] = None
    found = gathering.gather([put(tmp_path / "seed0.json", record)])
    page = Page(pages.make_page(found, digits()))
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_plots_go_to_a_folder(report, tmp_path):
    report(example_record(), arguments=["--plots", str(tmp_path / "plots")])
    names = {path.suffix for path in (tmp_path / "plots").iterdir()}
    assert names == {".png", ".svg"} and len(list((tmp_path / "plots").iterdir())) > 4


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    put(tmp_path / "runs" / "seed0.json", example_record())
    taken = tmp_path / "runs" / "seed0.json"
    for out, plots, line in (
        (tmp_path, None, "is no report and is not overwritten"),
        (Path("/dev/null"), None, "is no report and is not overwritten"),
        (taken / "x.html", None, "cannot write to "),
        (tmp_path / "x.html", taken / "plots", "cannot write to "),
    ):
        with pytest.raises(UserError, match=line):
            writing.write_report([tmp_path / "runs"], out, None, tmp_path, plots)
    assert not (tmp_path / "x.html").exists()


def test_a_link_is_followed(tmp_path):
    put(tmp_path / "runs" / "seed0.json", example_record())
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    writing.write_report([tmp_path / "runs"], tmp_path / "link.html", None, tmp_path)
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").is_file()
