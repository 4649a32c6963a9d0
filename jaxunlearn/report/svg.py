"""Matplotlib's SVG, made small: as elements without what nobody refers to, styles that are inherited, and digits.

Pure. A page of a report has a hundred figures; as matplotlib writes them they are four times as large.
"""

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

NUMBER = re.compile(r"-?\d*\.?\d+(?:[eE][-+]?\d+)?")
REFERENCE = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
NUMERIC = ("x", "y", "width", "height", "transform", "style", "viewBox")  # attributes that are rounded
# What the root says, or is said by default: no element need repeat it.
INHERITED = {"fill-opacity": "1", "stroke-opacity": "1", "stroke-linejoin": "round", "font-size": "12px"}


def parse(text: str) -> Element:
    """The root of matplotlib's SVG: without metadata, the rules that would apply to a whole page, and namespaces."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.text = element.text if element.tag == "text" else None
        element.tail = None
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    root.attrib = {name: root.attrib[name] for name in ("viewBox", "width", "height")}
    root.attrib |= {name: INHERITED[name] for name in ("stroke-linejoin", "font-size")}
    return root


def compact(root: Element, prefix: str) -> None:
    """Takes away, in place, what nobody sees. Ids that are referred to become `prefix` and a number."""
    used = [name for e in root.iter() for value in e.attrib.values() for name in _references(value)]
    names = {name: f"{prefix}{index}" for index, name in enumerate(dict.fromkeys(used))}
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) in names:
            element.set("id", names[name])
        if "d" in element.attrib:
            element.set("d", re.sub(r" ?([A-Za-z]) ?", r"\1", round_numbers(element.attrib["d"])))
        for key, value in element.attrib.items():
            for name in _references(value):
                value = value.replace(f"#{name}", f"#{names[name]}")
            element.set(key, round_numbers(value) if key in NUMERIC else value)
        if "style" in element.attrib:
            _shorten_style(element)
        if element.get("transform", "").startswith("rotate(0 "):
            del element.attrib["transform"]
    _unwrap(root)


def round_numbers(text: str) -> str:
    """Path data, a style or a transform with one decimal, without needless zeros. Colours stay what they are."""
    colours = COLOUR.findall(text)
    parts = [NUMBER.sub(_rounded, part) for part in COLOUR.split(text)]
    text = parts[0] + "".join(colour + part for colour, part in zip(colours, parts[1:], strict=True))
    return " ".join(text.split())


def themed(root: Element, names: Mapping[str, str]) -> None:
    """Makes each colour of `names` a CSS variable, in place: fill: #0072b2 is fill: var(--c1, #0072b2)."""
    for element in root.iter():
        if style := element.get("style"):
            element.set("style", COLOUR.sub(lambda found: f"var(--{names[found[0]]},{found[0]})", style))


def _rounded(found: re.Match[str]) -> str:
    text = f"{float(found[0]):.1f}".removesuffix(".0")
    return "0" if text == "-0" else text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _references(value: str) -> list[str]:
    return [a or b for a, b in REFERENCE.findall(value)]


def _shorten_style(element: Element) -> None:
    pairs = [part.partition(":")[::2] for part in element.attrib.pop("style").split(";")]
    style = {key.strip(): value.strip() for key, value in pairs}
    kept = {
        key: value
        for key, value in style.items()
        if key not in ("font", "font-family")  # the page's; matplotlib before 3.10 has one for all
        and value != INHERITED.get(key)
        and not (element.tag == "use" and key.startswith("stroke"))
    }
    if kept:
        element.set("style", ";".join(f"{key}:{value}" for key, value in kept.items()))


def _unwrap(parent: Element) -> None:
    """Puts what is in groups that say nothing in their place, and leaves out what draws nothing."""
    children = []
    for child in parent:
        _unwrap(child)
        if child.tag == "g" and not child.attrib:
            children += list(child)
        elif child.get("style") != "fill:none" and (child.tag != "defs" or len(child)):
            children.append(child)
    parent[:] = children
