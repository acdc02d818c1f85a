"""The page: what it holds, and what it does in a real browser that opens it from disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from stores import REFERENCE, C, M, U, add, refute, smoothed, time

from certbench.leaderboard import build as building
from certbench.leaderboard import page as page_room
from certbench.leaderboard.published import Notes
from certbench.plugins import Plugins
from certbench.results.store import ResultStore, certify_stage

pytestmark = pytest.mark.skipif(page_room.missing() is not None, reason=f"the page: {page_room.missing()}")

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} </style>"
FIGURE = {
    "table": "Table 1",
    "dataset": "mnist",
    "norm": "linf",
    "radius": "0.1",
    "method": "fast-ibp",
    "model": "cnn7",
    "metric": "certified_error",
    "value": 40.0,
    "spread": 1.0,
}
CARD = {"summary": "interval bounds", "paper": "arXiv 2103.17268", "norm": "linf", "guarantee": "real_arith"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two L-inf boards and a smoothed one, with costs, published figures, settings, a voided row and a hostile one."""
    patch = pytest.MonkeyPatch()
    patch.setattr(building, "installed", lambda: Plugins([]))
    folder = tmp_path_factory.mktemp("page")
    settings = "feedc0de" * 8
    for place, (run, verdicts) in enumerate({"a": [C] * 6 + [U, M], "b": [C] * 3 + [U] * 5}.items()):
        add(folder, run, verdicts, method=("fast-ibp", "other")[place], reference=REFERENCE)
        time(folder, run, "train", 100.0 * (2 - place))
        time(folder, run, certify_stage("ibp", settings), 1.0 + place)
    add(folder, "c", [C] * 8, method="broken")
    refute(folder, "c", [0])
    add(folder, "d", [C, U, U, U, U, U, U, U], method=HOSTILE, recipe_name=HOSTILE, model=HOSTILE)
    label = {"run_id": "d" * 16, "submitter": HOSTILE, "bundle_digest": "ab" * 32, "rechecked": 5}
    ResultStore(folder / "results").write_submission(label)
    for place, run in enumerate("89"):
        name = f"fast-ibp/mnist +{('method.kappa=0.5', HOSTILE)[place]}"
        add(folder, run, [C] * (5 - place) + [U] * (2 + place) + [M], recipe_name=name)
    add(folder, "e", [C, C, U], radius="1/5", method="fast-ibp")
    smoothed(folder, "f", [1000, 900, 700, 400], method="smoothmix")
    file = {"source": "Somebody 2021", "figures": [FIGURE, FIGURE | {"model": "resnext"}]}
    notes = Notes.model_validate({"methods": {"fast-ibp": CARD | {"published": [file]}}})
    (folder / "methods.json").write_text(notes.text(), encoding="utf-8")
    built = building.write(folder)
    assert built.without_page is None
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


# What it holds ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += data


def test_nothing_of_a_strangers_text_becomes_a_tag(html: str) -> None:
    found = Tags(html)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 1 and tags.count("style") == 1 and "img" not in tags
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert HOSTILE.replace("\n", " ") in found.words and "{{ 7*7 }}" in found.words


def test_it_asks_for_nothing_and_allows_only_its_own_script(html: str) -> None:
    found = Tags(html)
    for tag, attrs in found.tags:
        assert not {"src", "srcset", "action", "poster", "data"} & set(attrs)
        assert (attrs.get("href") or "#").startswith(("#", "data:,")), (tag, attrs)
    assert "url(" not in html and "@import" not in html
    (policy,) = [a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_it_is_small_and_every_byte_is_derived(folder: Path, html: str) -> None:
    assert len(html.encode()) < 200_000
    assert building.check(folder).found == []
    assert (folder / "index.html").read_text(encoding="utf-8") == building.build(folder).files["index.html"]
    (folder / "index.html").write_text(html.replace("75.00", "76.00", 1), encoding="utf-8")
    try:
        assert building.check(folder).found == ["index.html: differs"]
    finally:
        (folder / "index.html").write_text(html, encoding="utf-8")


def test_names_refer_to_each_other(html: str) -> None:
    tags = Tags(html).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        for name in ("aria-labelledby", "aria-controls", "aria-describedby", "for"):
            assert attrs.get(name, ids[0]) in ids
        if (attrs.get("href") or "").startswith("#"):
            assert (attrs["href"] or "")[1:] in ids


def test_charts_hold_no_words_of_strangers_and_the_pages_own_colours(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) >= 6
    for drawing in drawings:
        assert "script" not in drawing and "fast-ibp" not in drawing and "#b0000" not in drawing
        assert 'var(--s1)"' in drawing
        colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', drawing))
        assert all(colour.startswith("var(--") or colour in ("none", "transparent") for colour in colours)


def test_without_its_packages_the_build_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(page_room, "find_spec", lambda name: None)
    checked = building.check(copy)
    assert checked.found == [] and "index.html was not compared" in (checked.unchecked or "")
    built = building.write(copy)
    assert "pip install 'certbench[page]'" in (built.without_page or "")
    assert not (copy / "index.html").exists()  # rather none than one that may be out of date
    assert building.check(copy).unchecked is None


# In a browser ----------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_a_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium with chromedriver here: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("background-networking", "component-update", "sync", "quic", "extensions", "default-apps")
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-dev-shm-usage",
        *(f"disable-{part}" for part in quiet),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: Any, folder: Path) -> Any:
    size(browser, 1400, 900)
    browser.get("about:blank")
    browser.get(f"{(folder / 'index.html').as_uri()}#mnist-linf-0.1")
    return browser


def size(browser: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def rows(page: Any) -> list[str]:
    script = """return [...document.querySelectorAll('.board.open table.rows:not(.struck, .still) tbody.entry')]
        .filter(e => e.offsetParent !== null).map(e => e.querySelector('.name')?.textContent || e.innerText)"""
    return [str(name) for name in page.execute_script(script)]


def shown(page: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('.board')].filter(b => b.offsetParent !== null).map(b => b.id)"
    )
    return [str(name) for name in page.execute_script(script)]


def wait(page: Any, condition: Callable[[], bool], words: str) -> None:
    """For what the browser does on its own time: the address changes first, what is shown a moment later."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20).until(lambda _: condition(), words)


def wait_for_board(page: Any, expected: list[str]) -> None:
    wait(page, lambda: shown(page) == expected, f"only {expected} is shown")


def click(page: Any, selector: str) -> None:
    from selenium.webdriver.common.by import By

    page.find_element(By.CSS_SELECTOR, selector).click()


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


@needs_a_browser
def test_it_switches_boards(page: Any) -> None:
    wait_for_board(page, ["mnist-linf-0.1"])
    click(page, "nav a[data-board='mnist-linf-0.2']")
    wait_for_board(page, ["mnist-linf-0.2"])
    assert page.current_url.endswith("#mnist-linf-0.2")
    page.back()
    wait_for_board(page, ["mnist-linf-0.1"])
    click(page, "nav a[data-board='reproduction']")
    wait_for_board(page, ["reproduction"])
    assert len(rows(page)) == 2 and "0 reproduced, 1 off, 1 not run" in page.page_source
    assert (
        page.execute_script("return document.querySelector('[aria-current]').textContent") == "reproduction"
    )


@needs_a_browser
def test_the_trade_off_has_a_board_of_its_own(page: Any) -> None:
    click(page, "nav a[data-board='tradeoff']")
    wait_for_board(page, ["tradeoff"])
    text = page.execute_script("return document.querySelector('.board.open').textContent")
    assert "fast-ibp" in text and "hypervolume" in text and "never interpolated" in text
    drawing = page.execute_script("return document.querySelector('.board.open svg').outerHTML")
    assert drawing.count("var(--s") >= 3 and "e+" not in drawing  # points, and axes in plain digits


@needs_a_browser
def test_settings_unfold_below_the_table(page: Any) -> None:
    click(page, ".board.open details.settings summary")
    script = "return [...document.querySelectorAll('.board.open details.settings .name + * , .board.open details.settings th small')].map(e => e.innerText)"
    assert any("+method.kappa=0.5" in line for line in page.execute_script(script))


@needs_a_browser
def test_it_sorts_and_says_so(page: Any) -> None:
    first = ["fast-ibp", "other", HOSTILE]
    assert rows(page) == first
    head = "#mnist-linf-0\\.1 thead th:nth-child({}) button"
    click(page, head.format(5))  # certified %, falling first
    assert rows(page) == first
    click(page, head.format(5))
    assert rows(page) == first[::-1]
    script = "return document.querySelector('.board.open th[aria-sort]').getAttribute('aria-sort')"
    assert page.execute_script(script) == "ascending"
    said = page.execute_script("return document.querySelector('.board.open .said').textContent")
    assert said == "3 of 3 rows, sorted by certified %, ascending"
    click(page, head.format(1))
    assert rows(page) == [HOSTILE, "fast-ibp", "other"]
    click(page, head.format(9))  # training: what is unknown stands last
    assert rows(page) == ["other", "fast-ibp", HOSTILE]
    click(page, head.format(9))
    assert rows(page) == ["fast-ibp", "other", HOSTILE]


@needs_a_browser
def test_it_filters_by_words_and_by_conditions(page: Any) -> None:
    from selenium.webdriver.common.by import By

    field = page.find_element(By.CSS_SELECTOR, ".board.open .filter")
    for words, names in (
        ("fast", ["fast-ibp"]),
        ("certified<50", ["other", HOSTILE]),
        ("certified<50 oth", ["other"]),
        ("train>=150", ["fast-ibp"]),
        ("nonsense>1", []),
        ("", ["fast-ibp", "other", HOSTILE]),
    ):
        field.clear()
        press_into(field, words)
        assert rows(page) == names, words
    click(page, "nav a[data-board='reproduction']")
    wait_for_board(page, ["reproduction"])
    click(page, ".board.open .kind[value='not run']")
    assert len(rows(page)) == 1


def press_into(field: Any, words: str) -> None:
    field.send_keys(words + " \b")  # the browser's own input event, also for no words


@needs_a_browser
def test_a_row_unfolds_by_keyboard_alone(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    for _ in range(60):
        press(page, Keys.TAB)
        if page.execute_script("return document.activeElement.className") == "unfold":
            break
    focus = "return document.activeElement.getAttribute('aria-expanded')"
    assert page.execute_script(focus) == "false"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(outline) == "solid"
    press(page, Keys.ENTER)
    assert page.execute_script(focus) == "true"
    text = page.execute_script("return document.querySelector('.board.open .more:not([hidden])').innerText")
    for words in ("aaaaaaaaaaaaaaaa", "certified", "misclassified", "75.00%", "settings feedc0de"):
        assert words in text
    press(page, Keys.SPACE)
    assert page.execute_script(focus) == "false"


@needs_a_browser
def test_the_skip_link_and_the_board_picker_work_by_keyboard(page: Any, folder: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page.get("about:blank")
    page.get((folder / "index.html").as_uri())
    press(page, Keys.TAB, Keys.ENTER)
    wait(
        page,
        lambda: page.execute_script("return document.activeElement.id") == "main",
        "the link skips to main",
    )
    before = shown(page)
    size(page, 800, 900)
    page.execute_script("document.getElementById('pick').focus()")
    press(page, Keys.ARROW_DOWN)
    press(page, Keys.ENTER)
    wait(page, lambda: shown(page) != before and len(shown(page)) == 1, "another board is shown, alone")


@needs_a_browser
def test_a_recipe_can_be_copied(page: Any) -> None:
    page.execute_script("document.querySelector('.board.open .card details').open = true")
    from selenium.webdriver.support.ui import WebDriverWait

    click(page, ".board.open .card details .copy")
    said = "return document.querySelector('.board.open .copy').textContent"
    WebDriverWait(page, 10).until(lambda p: "Copied" in p.execute_script(said))  # the clipboard answers later
    pre = page.execute_script("return document.querySelector('.board.open .card pre').textContent")
    assert pre == "certbench run fast-ibp/mnist --seeds 0"


@needs_a_browser
@pytest.mark.parametrize("width", [1400, 800, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(page: Any, width: int, scheme: str) -> None:
    size(page, width, 900)
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
        "it scrolls sideways"
    )
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (_brightness(colour) for colour in page.execute_script(colours))
    assert (ink < 60 and paper > 230) if scheme == "light" else (ink > 200 and paper < 60)
    line = "return getComputedStyle(document.querySelector('.board.open svg path[stroke*=s1]')).stroke"
    assert page.execute_script(line).startswith("rgb")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    if width == 390:
        label = "return getComputedStyle(document.querySelector('.board.open td[data-label]'), '::before').content"
        assert "guarantee" in page.execute_script(label)


def _brightness(colour: str) -> float:
    numbers = [float(n) for n in re.findall(r"[0-9.]+", colour)[:3]]
    return sum(numbers) / 3 * (255 if "srgb" in colour else 1)


@needs_a_browser
def test_the_theme_can_be_chosen(page: Any) -> None:
    page.execute_script("localStorage.clear()")
    page.refresh()
    for theme in ("light", "dark", "auto"):
        click(page, "#theme")
        assert page.execute_script("return document.documentElement.dataset.theme") == theme


@needs_a_browser
def test_print_shows_the_board_and_no_controls(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = (
        "return [...document.querySelectorAll('.top, .controls, .side')].every(e => e.offsetParent === null)"
    )
    assert page.execute_script(hidden) and shown(page) == ["mnist-linf-0.1"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@needs_a_browser
def test_it_makes_no_request_and_no_error(page: Any) -> None:
    import json

    page.get_log("performance")  # what the browser asked for itself when it started
    for board in ("mnist-linf-0.1", "cifar10-l2-sigma-0.5--fixed-1", "reproduction"):
        page.get(f"{page.current_url.split('#')[0]}#{board}")
        page.refresh()
        page.execute_script("document.querySelectorAll('.board.open .unfold').forEach(b => b.click())")
    assert page.get_log("browser") == []
    asked = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(
        url.startswith("file://") and "index.html" in url for url in asked if url != "about:blank"
    )
