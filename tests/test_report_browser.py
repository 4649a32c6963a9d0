"""The report as a reader sees it: a real browser, without a screen."""

import shutil

import pytest
from example_record import example_record
from test_gathering import put

from jaxunlearn.commands.main import script

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
QUIET = (  # a browser's own looks into the network, and its sandbox, which root cannot have
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (360, 768, 1280)
EVIL = '"><script>document.title = "broken"</script><img src=x onerror="document.title = 1">'


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a report with two methods of three seeds, a reference, published rows and a hostile record."""
    folder = tmp_path_factory.mktemp("report")
    for seed in range(3):
        for method, score in (("scrub", 0.9), ("salun", 0.8), ("retrain", 0.95)):
            record = example_record(method=method, seed=seed, symmetric_score=score + seed / 100, hyperparameters={})
            put(folder / "runs" / method / f"seed{seed}.json", record)
    put(
        folder / "runs" / "evil" / "seed0.json", example_record(method=EVIL, command=EVIL, hyperparameters={EVIL: EVIL})
    )
    assert (
        script("report", [str(folder / "runs"), "--out", str(folder / "report.html"), "--cache-dir", str(folder)]) == 0
    )
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser, address, request):
    """The report in a new window; afterwards nothing was complained of, and nothing was asked of any network."""
    options = getattr(request, "param", {})
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(5000)
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.goto(address)
    yield opened
    assert said == [] and {url.partition("#")[0] for url in asked if not url.startswith("data:")} == {address}
    context.close()


def column(page, name):
    """The text of a column of the first table, from above."""
    place = page.locator("table.sortable").first.locator("thead th").all_inner_texts().index(name)
    rows = page.locator("table.sortable").first.locator("tbody tr:visible")
    return [rows.nth(i).locator("th, td").nth(place).inner_text() for i in range(rows.count())]


def test_rows_are_sorted_by_click_and_by_key(page):
    button = page.locator("table.sortable").first.get_by_role("button", name="retain_acc")
    button.click()
    values = column(page, "retain_acc")
    known = [float(value.split()[0]) for value in values if value]
    assert len(known) > 3 and known == sorted(known)
    button.press("Enter")
    turned = [float(value.split()[0]) for value in column(page, "retain_acc") if value]
    assert turned == known[::-1]
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.locator("table.sortable").first.get_by_role("button", name="method").press("Space")
    names = column(page, "method")
    assert names == sorted(names, key=str.lower) and page.locator("th[aria-sort]").count() == 1


def test_rows_are_filtered(page):
    page.get_by_label("Filter rows").fill("salun")
    assert set(column(page, "method")) == {"salun"}
    assert page.locator("details.run:visible").count() == 1 and "rows" in page.get_by_role("status").inner_text()
    page.get_by_label("Filter rows").fill("")
    assert {"scrub", "salun", "retrain", "pretrained"} <= set(column(page, "method"))


def test_a_link_opens_a_methods_details(page, address):
    page.get_by_label("Filter rows").fill("retrain")
    link = page.locator("table.sortable a", has_text="scrub").first.get_attribute("href")
    page.evaluate("address => { location.href = address }", link)
    page.wait_for_selector(f"{link}[open]")
    assert page.locator(link).is_visible() and page.locator(f"{link} figure svg").count() > 0
    page.locator(f"{link} > summary").click()
    assert page.locator(f"{link}[open]").count() == 0
    page.get_by_label("Filter rows").fill("")
    page.locator(f'table.sortable a[href="{link}"]').first.click()  # again, to where the address is already
    page.wait_for_selector(f"{link}[open]")
    page.goto(f"{address}{link}")
    page.reload()
    assert page.locator(f"{link}[open]").count() == 1


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_light_and_dark(page):
    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.locator("#theme").click()
    assert paper() != before
    page.reload()
    assert paper() != before  # it is remembered


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_but_tables_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    ("page", "rules"),
    [({"color_scheme": "light"}, ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]), ({"color_scheme": "dark"}, None)],
    indirect=["page"],
)
def test_a_tool_finds_nothing_that_shuts_readers_out(page, rules):
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    chosen = {"runOnly": rules or {"type": "rule", "values": ["color-contrast"]}}  # in the dark all else is as it was
    found = axe.Axe().run(page, options=chosen)
    assert found.violations_count == 0, found.generate_report()


def test_text_of_strangers_is_text(page):
    assert page.title() == "Unlearning results" and page.locator("body img[src=x]").count() == 0
    assert EVIL in page.locator("table.sortable").first.inner_text()


def test_without_javascript_all_is_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("details.run").count() == 4 and page.locator("#filter").is_hidden()
    page.locator("details.run summary").first.click()
    assert page.locator("details.run figure svg").first.is_visible()
    context.close()
