"""Every link between the documents leads somewhere, on a code host as in the site that Sphinx builds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OTHERS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "results/README.md")]
DOCUMENTS = [*OTHERS, *sorted(DOCS.rglob("*.md"))]


def plain(text):
    """Without fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Of its headings, as code hosts and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", plain(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead(path, text):
    """The links of a document that lead nowhere."""
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", plain(text)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        # The site has no pages of folders, nor of what is written elsewhere.
        on_site = target.is_file() and (target.suffix != ".md" or target.is_relative_to(DOCS))
        found = on_site if path.is_relative_to(DOCS) else target.exists()
        if not found or (anchor and anchor not in anchors(target.read_text())):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_link_is_dead(path):
    assert not list(dead(path, path.read_text()))


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "there.md").write_text("# What `x` is, here\n\n```\n# No heading\n[no](link)\n```\n")
    text = "[a](there.md#what-x-is-here) [b](there.md#no-heading) [c](gone.md) [d](https://x.org/y) [e](there.md)"
    assert list(dead(tmp_path / "one.md", text)) == ["there.md#no-heading", "gone.md"]
    text = "[f](../results) [g](../README.md) [h](../LICENSE) [i](index.md)"
    assert list(dead(DOCS / "one.md", text)) == ["../results", "../README.md"]


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"^([\w/-]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    assert {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.rglob("*.md")} == listed | {"index"}
