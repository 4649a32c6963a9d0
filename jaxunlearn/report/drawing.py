"""How figures look, and what becomes of them: a part of a page, or files for papers.

matplotlib is an extra, so it is imported where something is drawn. Never by way of pyplot: nothing is global, and no
display is needed. What is drawn from records is strangers' text: it is shown as it is, never set as mathematics.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rich.cells import cell_len, set_cell_size

from jaxunlearn.errors import UserError, printable
from jaxunlearn.files import write_atomically
from jaxunlearn.report import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INSTALL_MATPLOTLIB = 'pip install -e ".[report]" (or pip install matplotlib)'

# A phone's page is some 330 pixels wide, and there no text may be smaller than 11: a figure of 4.8 inches is 346 units.
WIDTH, HEIGHT = 4.8, 3.4  # inches
LINE = 0.27  # inches that a row of text takes
FONT = 12  # units, of all text
# Each stands out from white and from nearly black (3:1, as WCAG asks of graphics). Those of a plot also differ in
# marker or dash.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#997700", "#777777", "#a0685c", "#aa4499")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2)))
INK, PAPER, GRID = "#1a1a1a", "#ffffff", "#d6d6d6"
VARIABLES = {INK: "ink", PAPER: "paper", GRID: "grid"} | {colour: f"c{k}" for k, colour in enumerate(COLOURS, 1)}
STYLE = {
    "font.size": FONT,
    "figure.titlesize": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.6,
    "patch.linewidth": 1.6,
    "lines.markersize": 6,
    "path.simplify": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxunlearn",
}


class Plot(NamedTuple):
    """A figure, and what is to be seen in it."""

    name: str  # [a-z0-9-], unique among the plots that it is made with
    title: str
    text: str  # in a sentence or two with the main numbers: for whoever does not see the figure
    figure: "Figure"


def finished(name: str, title: str, text: str, figure: "Figure") -> Plot:
    """The plot of a figure that is whole. It is laid out here, once: each time again would move it by a little."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return Plot(name, title, text, figure)


class Look(NamedTuple):
    """How a series is drawn: told from the others without its colour, too."""

    color: str
    marker: str
    dash: Any


def require_matplotlib(what: str) -> None:
    """Raises UserError, which begins with what needs it, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(f"{what} needs matplotlib: {INSTALL_MATPLOTLIB}") from None


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures are made and written in the style of the package, whatever a user's settings are."""
    require_matplotlib("the report")
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # Of a script that the font does not have, a PNG shows boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def looks() -> Iterator[Look]:
    """One after another, each colour with a marker; dashes come round sooner."""
    return map(Look, cycle(COLOURS), cycle(MARKERS), cycle(DASHES))


def panels(rows: int = 1, height: float = HEIGHT, **more: Any) -> "tuple[Figure, list[Axes]]":
    """A new figure and its axes, below one another. `height` in inches, of all; `more` is for `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained", facecolor="none")
    return figure, list(figure.subplots(rows, 1, squeeze=False, **more)[:, 0])


def rows_of_text(names: Sequence[str], legends: int = 1, lines: float = 1.2) -> "tuple[Figure, Axes]":
    """A new figure with a row for each name, at 0, 1, ... from above.

    Args:
      names: of one or more lines.
      legends: lines of the legend above them.
      lines: that a name of one line takes.
    """
    height = sum(name.count("\n") + lines for name in names) + legends + 3
    figure, (axes,) = panels(height=LINE * height)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def decades(axis: "Axis") -> None:
    """Numbers as they are at the decades of a logarithmic axis, or at more where it has but one."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    plain_numbers(axis)


def plain_numbers(axis: "Axis") -> None:
    """No powers, which matplotlib would set as mathematics, and none between the main ones."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: "Axis") -> None:
    """No fractions of what is counted."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True))


def numbers(parts: Sequence[str], most: int = 6) -> str:
    """Numbers with their names, in one sentence; of many the first and how many more there are."""
    more = [f"{len(parts) - most} more"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def legend(axes: "Axes", figure: "Figure | None" = None) -> None:
    """Names the series of `axes` above it, or above all of `figure`, which is wider: where they hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    room = 72 * WIDTH * (1.0 if figure else 0.85)
    columns = max(1, int(room // (45 + 0.5 * FONT * max(map(len, labels)))))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # as many in each
    if figure:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)
    else:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def label(text: Any, longest: int = 24) -> str:
    """A stranger's text as a short line of characters that can be shown; a wide one, as 漢 is, counts twice."""
    text = printable(str(text))
    text = f" {text}" if text[:1] in ("", "_") else text  # else no legend has it
    return text if cell_len(text) <= longest else f"{set_cell_size(text, longest - 1).rstrip()}…"


def inline_svg(plot: Plot, prefix: str = "") -> str:
    """The figure as an `<svg>` for an HTML page: as wide as its place, in the page's colours where it has them.

    Colours are the CSS variables `--ink`, `--paper`, `--grid` and `--c1` to `--c8`. Ids begin with `prefix` and the
    plot's name. The same plot gives the same text.
    """
    root = _svg(plot.figure, "none")
    name = f"{prefix}{plot.name}"
    svg.compact(root, f"{name}-")
    svg.themed(root, VARIABLES)
    del root.attrib["height"]
    root.attrib |= {"width": "100%", "role": "img", "aria-labelledby": f"{name}-title {name}-text"}
    for tag, said in (("desc", plot.text), ("title", plot.title)):
        element = Element(tag, id=f"{name}-{'text' if tag == 'desc' else tag}")
        element.text = said
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def save(plots: Sequence[Plot], folder: Path, prefix: str) -> list[Path]:
    """Writes `<prefix>-<name>.svg` and `.png` (200 dots an inch) of each plot, black on white, and returns the paths.

    Raises OSError.
    """
    written = []
    for plot in plots:
        for suffix in (".svg", ".png"):
            written.append(folder / f"{prefix}-{plot.name}{suffix}")
            write_figure(plot.figure, written[-1])
    return written


def write_figure(figure: "Figure", path: Path) -> None:
    """Writes a .svg or .png, whole or not at all. Raises OSError."""
    if path.suffix == ".svg":
        root = _svg(figure, PAPER)
        svg.compact(root, "p")
        root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": "DejaVu Sans, Arial, sans-serif"}
        content = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    else:
        image = io.BytesIO()
        with style():
            figure.savefig(image, format="png", dpi=200, facecolor=PAPER, metadata={"Software": None})
        content = image.getvalue()
    write_atomically(path, content)


def _svg(figure: "Figure", paper: str) -> Element:
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style():
        figure.savefig(text, format="svg", facecolor=paper, metadata=nothing)
    return svg.parse(text.getvalue())
