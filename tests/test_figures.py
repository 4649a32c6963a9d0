"""How figures become parts of pages and files: small, the same every time, and with strangers' text as it is."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from example_record import example_record

from jaxunlearn.errors import UserError
from jaxunlearn.report import svg
from jaxunlearn.report.labels import places

pytest.importorskip("matplotlib")

import matplotlib
from PIL import Image

from jaxunlearn.report import drawing
from jaxunlearn.report.drawing import COLOURS, VARIABLES, inline_svg, save
from jaxunlearn.report.plots import board_plots, run_plots
from jaxunlearn.results.boards import boards

PHONE = 328  # pixels that a figure has there
PRETRAINED = example_record()["curves"] | {"unlearn": None, "evaluated": None}
HOSTILE = [
    "$\\frac{1}$",
    "</text><script>alert(1)</script>",
    "a&amp;b\x1b[31m\x00\ud800",
    "_",
    "漢" * 400,
    "x=#0072b2;url(#a)",
]


@pytest.fixture(scope="module")
def plots():
    """All of a run and of a board."""
    (board,) = boards([example_record(method=name, hyperparameters={}) for name in ("scrub", "retrain")])
    return run_plots([example_record()]) + [plot._replace(name=f"b-{plot.name}") for plot in board_plots(board)]


@pytest.fixture(scope="module")
def pages(plots):
    """By name, what stands in a page."""
    return {plot.name: inline_svg(plot, "r1-") for plot in plots}


def texts(root):
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]


def test_a_figure_in_a_page_is_small_named_and_as_wide_as_its_place(plots, pages):
    for plot in plots:
        text = pages[plot.name]
        root = ElementTree.fromstring(text)
        assert len(text) < 9_500, plot.name
        assert (root.get("role"), root.get("width"), root.get("height")) == ("img", "100%", None)
        title, said = root[0], root[1]
        assert (title.tag, title.text, said.tag, said.text) == ("title", plot.title, "desc", plot.text)
        assert root.get("aria-labelledby") == f"{title.get('id')} {said.get('id')}"
    assert sum(map(len, pages.values())) < 7_500 * len(pages)


def test_no_text_is_small_on_a_phone(pages):
    for text in pages.values():
        width = float(ElementTree.fromstring(text).get("viewBox").split()[2])
        sizes = {float(size) for size in re.findall(r"font-size[:=\"]+([\d.]+)", text)}
        assert min(sizes) * PHONE / width >= 11


def test_ids_are_told_apart_on_one_page_and_nothing_refers_to_none(plots, pages):
    roots = [ElementTree.fromstring(text) for text in [*pages.values(), inline_svg(plots[0], "r2-")]]
    ids = [element.get("id") for root in roots for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    for root in roots:
        own = {element.get("id") for element in root.iter()}
        values = [value for element in root.iter() for value in element.attrib.values()]
        assert {name for value in values for name in re.findall(r"^(?:url\()?#([^)]+)", value)} <= own


def test_the_page_chooses_every_colour(pages):
    for text in pages.values():
        rest = re.sub(r"var\(--(ink|paper|grid|c[1-8]),#[0-9a-f]{6}\)", "", text)
        assert not re.search(r"#[0-9a-fA-F]{6}|black|white|rgb", rest) and "<style" not in text
    assert "var(--c1," in pages["confidences"] and "var(--ink," in pages["confidences"]


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("paper", ["#ffffff", "#15171b"])
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_light_and_dark_paper(paper, colour):
    low, high = sorted((luminance(paper), luminance(colour)))
    assert (high + 0.05) / (low + 0.05) >= 3
    assert VARIABLES[colour] == f"c{COLOURS.index(colour) + 1}"


def test_the_same_records_give_the_same_bytes(pages, tmp_path):
    again = [plot for plot in run_plots([example_record()]) if plot.name in ("roc", "classes")]
    assert [inline_svg(plot, "r1-") for plot in again] == [pages[plot.name] for plot in again]
    first, second = (save(again[:1], tmp_path / name, "x") for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_files_are_for_papers_white_and_whole(plots, tmp_path):
    paths = save(plots[:1], tmp_path / "new", "scrub-42")
    assert [path.name for path in paths] == ["scrub-42-confidences.svg", "scrub-42-confidences.png"]
    assert sorted(tmp_path.glob("new/*")) == sorted(paths)
    root = ElementTree.parse(paths[0]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in paths[0].read_text()
    with Image.open(paths[1]) as image:
        assert image.size[0] == 960 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_users_own_settings_change_nothing_and_are_kept(pages):
    with matplotlib.rc_context({"lines.linewidth": 7, "font.size": 30, "svg.fonttype": "path"}):
        (plot,) = run_plots([example_record(companions=None, curves=PRETRAINED)])
        assert inline_svg(plot, "r1-") == pages["pretraining"]
        assert matplotlib.rcParams["lines.linewidth"] == 7


def test_strangers_text_is_shown_as_what_it_is(tmp_path):
    records = [example_record(method=name, companions=None, hyperparameters={name: name}) for name in HOSTILE]
    (board,) = boards(records)
    records[0]["curves"]["unlearn"] = {name: [1.0, 2.0] for name in HOSTILE}
    made = {plot.name: plot for plot in [*board_plots(board), *run_plots(records[:1])]}
    for plot in (made["accuracies"], made["seconds"], made["unlearning"]):
        root = ElementTree.fromstring(inline_svg(plot))
        tags = {element.tag for element in root.iter()}
        assert tags <= {"svg", "title", "desc", "g", "defs", "path", "use", "text", "clipPath", "rect"}
        shown = texts(root)
        assert all(any(drawing.label(name).strip()[:8] in text for text in shown) for name in HOSTILE), plot.name
        assert max(map(len, shown)) < 70 and all(text.isprintable() for text in shown)
    save([made["accuracies"]], tmp_path, "hostile")


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'the report needs matplotlib: pip install -e "\.\[report\]"'):
        run_plots([example_record()])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("scrub", "scrub"),
        ("a" * 25, "a" * 23 + "…"),
        ("漢" * 13, "漢" * 11 + "…"),
        ("a\nb\x00", "a\\nb\\x00"),
        ("_hidden", " _hidden"),
    ],
)
def test_a_label_is_one_short_line(text, shown):
    assert drawing.label(text) == shown


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("M 10.04 -0.96 L 0.5 -0.04", "M 10 -1 L .5 0"),
        ("stroke: #0072b2; stroke-width: 0.84", "stroke: #0072b2; stroke-width: .8"),
        ("fill: #1e5555", "fill: #1e5555"),
        ("rotate(-90 15.4449 1e-3)", "rotate(-90 15.4 0)"),
        ("-0.55 100 1e2", "-.6 100 100"),
    ],
)
def test_numbers_are_rounded_and_colours_are_not(text, short):
    assert svg.round_numbers(text) == short


def test_what_nobody_sees_is_left_out():
    root = svg.parse(
        """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9"
        width="9pt" height="9pt"><metadata>x</metadata><defs><style>*{fill: red}</style></defs><g id="a">
        <g id="b" clip-path="url(#c)"><path id="d" d="M 1.23 0.5\nL 2 3.999 z"
        style="fill: #0072b2; stroke-linejoin: round"/></g></g><path d="M 0 0" style="fill: none"/>
        <use xlink:href="#d" x="1.55" style="fill: #ffffff; stroke: #000000"/>
        <text style="font-size: 12px; font-family: 'A'" transform="rotate(-0 1 1)">1.234 #d</text>
        <clipPath id="c"><rect x="0" y="0" width="1.26" height="1"/></clipPath></svg>"""
    )
    svg.compact(root, "p")
    group, use, text, clip = root
    assert (group.tag, group.attrib) == ("g", {"clip-path": "url(#p0)"}) and clip.attrib == {"id": "p0"}
    assert group[0].attrib == {"id": "p1", "d": "M1.2 .5L2 4z", "style": "fill:#0072b2"}
    assert use.attrib == {"href": "#p1", "x": "1.6", "style": "fill:#ffffff"}
    assert (text.text, text.attrib) == ("1.234 #d", {})


def test_labels_cover_neither_each_other_nor_points():
    points = [(20.0, 100.0 + 3 * k) for k in range(8)]
    boxes = [(x, y, x + 60, y + 14) for x, y in places(points, [(60.0, 14.0)] * 8, (0, 0, 300, 240))]
    for k, a in enumerate(boxes):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 300 and a[3] <= 240
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:k])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in points)


def test_a_label_alone_stands_beside_its_point_and_without_room_there_is_still_one():
    ((x, y),) = places([(50, 50)], [(30, 10)], (0, 0, 100, 100))
    assert (x, y) == (56, 45)
    assert len(places([(5, 5)] * 30, [(30, 10)] * 30, (0, 0, 40, 20))) == 30


def test_importing_the_report_needs_no_matplotlib():
    files = Path(drawing.__file__).parent.glob("*.py")
    assert not [file for file in files if re.search("^(import|from) matplotlib", file.read_text(), re.MULTILINE)]
