"""What an audit shows on stdout."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxunlearn.results.tables import table_console

FILE_WIDTH = 120  # columns, of output that is no terminal
TITLES = {
    "true_class": "By the margin of the true class",
    "retained": "By the margin among the retained classes (a sunken logit of the forgotten class is not seen)",
}
UNTOUCHED, HALVES = "(untouched)", "(retrain halved)"
# Two tables, of which each begins with who stands in the place of the unlearned models.
SEPARATIONS = ("U-LiRA auc", "tpr at 1% fpr", "balanced acc", "RMIA auc", "tpr at 1% fpr")
DISTANCES = ("KLOM forget (floor)", "retain", "test", "quality (ceiling)", "population auc")


def rows(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What stands in the place of the unlearned models, and its attacks: originals, each method, retrained halves."""
    shown = [(UNTOUCHED, records[0]["attacks"]["pretrained"])]
    shown += [(record["method"], record["attacks"]["unlearned"]) for record in records]
    shown += [(HALVES, records[0]["attacks"]["retrained"])]
    yield from ((name, attacks) for name, attacks in shown if attacks)


def cells(attacks: Mapping[str, Any], statistic: str, sign: str = "±") -> list[str]:
    """What stands in a row under `SEPARATIONS` and `DISTANCES`, by one of `TITLES`."""
    return [*_separations(attacks, statistic, sign), *_distances(attacks, statistic, sign)]


def print_audit(records: Sequence[Mapping[str, Any]]) -> None:
    """Prints audits of one benchmark, at least one, and how to read them."""
    console = table_console(width=FILE_WIDTH)
    sign = "±" if console.encoding.startswith("utf") else "+-"
    first = records[0]
    models = f"{first['models']} originals, retrained and unlearned models each"
    console.print(f"{first['bench']}: {models}, told from retrained ones example by example", style="bold")
    for statistic, title in TITLES.items():
        console.print(title, style="bold")
        for columns, cells in ((SEPARATIONS, _separations), (DISTANCES, _distances)):
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
            for column in ("", "N", *columns):
                table.add_column(column, justify="right" if column else "left", overflow="fold")
            for name, attacks in rows(records):
                table.add_row(name, str(attacks["models"]), *cells(attacks, statistic, sign))
            console.print(table)
            console.print()
    for line in remarks(records, sign):
        console.print(line)


def _separations(attacks: Mapping[str, Any], statistic: str, sign: str) -> list[str]:
    ulira, rmia = attacks[statistic]["ulira"], attacks[statistic]["rmia"]
    balanced = f"{ulira['balanced_accuracy']:.3f}" if ulira else "-"
    return [*_separation(ulira, sign), balanced, *_separation(rmia, sign)]


def _distances(attacks: Mapping[str, Any], statistic: str, sign: str) -> list[str]:
    klom, quality = attacks[statistic]["klom"], attacks[statistic]["forgetting_quality_of_originals"]
    return [
        f"{klom['forget_train']:.2f} ({klom['floor']:.2f})",
        f"{klom['retain_train']:.2f}",
        f"{klom['retain_test']:.2f}",
        f"{quality['score']:.3f} ({quality['ceiling']:.3f})",
        f"{attacks['population_auc']:.3f}",
    ]


def _separation(found: Mapping[str, Any] | None, sign: str) -> list[str]:
    if found is None:
        return ["-", "-"]
    low, high = found["tpr_interval"]
    return [f"{found['auc']:.3f} {sign}{found['auc_half_width']:.3f}", f"{found['tpr']:.3f} [{low:.3f}, {high:.3f}]"]


def remarks(records: Sequence[Mapping[str, Any]], sign: str) -> Iterator[str]:
    """How to read audits of one benchmark, and what each method's left out and took."""
    yield f"{sign} and [] are 95% intervals over models; an auc of .5, and a tpr of .01, is as if retrained."
    yield "N models a side: values at different N do not compare. KLOM (95th percentiles, nats) has a floor, forgetting"
    yield "quality (of one unlearning of each original) a ceiling: what models give that are spread alike."
    yield f"{UNTOUCHED} originals as they were: what no unlearning looks like."
    yield f"{HALVES} one half of the retrained models against the other: what having forgotten looks like."
    yield "population auc: the attack on one model at a time, without others; .5 proves nothing."
    for record in records:
        if failed := record["models"] - len(record["seeds"]):
            yield f"{record['method']}: {failed} of {record['models']} seeds are left out: a model of theirs failed."
        cost, device, more = record["cost"], record["environment"]["device_kind"], record["models"]
        rate = f"{cost['models_per_hour'] or 0:,.0f} models an hour (originals, retrained and unlearned; {device})"
        yield f"{record['method']}: {rate}; {more} more of each take {cost['as_many_again_s'] / 60:,.1f} minutes."
    yield "What this means: docs/audit.md"
