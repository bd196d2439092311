"""The status page, as a real browser shows it."""

from __future__ import annotations

import html
import re
import shutil
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import sync_playwright

import forwardpass_client
from forwardpass_server.calls.model import ModelSource
from forwardpass_server.catalog.load_log import Load
from forwardpass_server.catalog.registry import Entry, State
from forwardpass_server.status import page as status_page
from forwardpass_server.status.page import Status
from forwardpass_server.status.recent import Recent
from forwardpass_server.telemetry.health import HealthReading
from forwardpass_server.telemetry.metrics import Metrics
from support import traffic
from support.servers import ServerProcess

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def busy():
    """A server that was called in every way."""
    with ServerProcess(*traffic.ARGUMENTS) as server:
        traffic.send(server)
        yield server


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("the tests of the status page need a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, busy, tmp_path):
    """Opens the page without JavaScript, which it must not need, and fails where it fetches anything more."""
    contexts = []

    def open_page(viewport=DESKTOP, color_scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=color_scheme, java_script_enabled=False)
        contexts.append(context)
        page = context.new_page()
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        url = busy.metrics_url.removesuffix("metrics")
        page.goto(url)
        # A browser asks for the icon of any site by itself.
        assert [one for one in fetched if not one.endswith("favicon.ico")] == [url]
        page.screenshot(path=tmp_path / f"{viewport['width']}_{color_scheme}.png", full_page=True)
        return page

    yield open_page
    for context in contexts:
        context.close()


def get(server: ServerProcess, path: str):
    with urllib.request.urlopen(server.metrics_url.removesuffix("metrics") + path) as response:
        return response.status, dict(response.headers), response.read().decode()


def test_the_page_shows_models_weights_and_sessions(open_page):
    page = open_page()
    assert page.title() == "forwardpass: ready"
    assert page.locator("header .pill").inner_text() == "ready"
    assert "CPU:0" in page.locator("header p").inner_text()
    models = page.locator("section", has=page.get_by_role("heading", name="Models"))
    rows = {row.locator("td").first.inner_text(): row for row in models.locator("tbody tr").all()}
    assert list(rows) == ["broken", "counting", "crashing", "slow", "wide"]
    assert "failed" in rows["broken"].inner_text()
    assert "has no function 'missing'" in rows["broken"].inner_text()
    assert "available" in rows["wide"].inner_text()
    assert "loaded in" in rows["wide"].inner_text()
    text = page.inner_text("main")
    for shown in ("PredictOnBatch on pipelines", "1 MiB of 2 MiB", "Metric sessions", "Memory of the process"):
        assert shown in text, shown


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_element_fits_the_viewport_and_has_enough_contrast(open_page, browser, busy, viewport, color_scheme):
    page = open_page(viewport, color_scheme)
    assert page.locator("main").bounding_box()["width"] <= viewport["width"]
    for element in page.locator("section, .tiles > div, td, dd").all():
        box = element.bounding_box()
        if box is not None:
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= viewport["width"] + 1
    # Contrast of at least 4.5, as WCAG's AA asks, is the browser's own to measure: it has resolved the colours.
    with browser.new_context(color_scheme=color_scheme) as context:
        scripted = context.new_page()
        scripted.set_content(re.sub("<meta http-equiv[^>]*>", "", get(busy, "")[2]))
        for selector in ("h1", "header p", ".tiles dt", ".facts dt", "small", "th", ".pill.good", ".pill.bad", "a"):
            assert scripted.evaluate(CONTRAST, selector) >= 4.5, selector


CONTRAST = """selector => {
  const element = document.querySelector(selector);
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  let behind = element;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const luminance = color => {
    const [r, g, b] = numbers(color).map(one => one / 255).map(
      one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_the_port_serves_the_page_and_the_metrics_only(busy):
    code, headers, page = get(busy, "")
    assert code == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "<script" not in page
    assert "grpc_server_started_total" in get(busy, "metrics")[2]
    for path in ("nonsense", "../etc/passwd", "metrics/x"):
        with pytest.raises(urllib.error.HTTPError) as raised:
            get(busy, path)
        raised.value.close()
        assert raised.value.code == 404


def test_the_page_contains_no_weights_id(busy):
    page = get(busy, "")[2]
    with forwardpass_client.connect(busy.address) as client:
        model = client.model("wide")
        handle = model.put_weights(model.initial_weights)
        assert handle.id[:12] not in get(busy, "")[2]
    assert not re.search("[0-9a-f]{16}", page)


def test_text_from_outside_is_escaped():
    hostile = "<script>alert('&')</script>"
    metrics = Metrics()
    source = ModelSource(hostile, 1)
    page = status_page.render(
        Status(
            version=hostile,
            tensorflow=hostile,
            device=hostile,
            started=0,
            health=HealthReading(has_started=True, is_live=True, is_ready=False, is_draining=False),
            unready_reasons=[hostile],
            session_store_problem=hostile,
            entries=[Entry(source, State.FAILED, error=hostile, waiting=hostile)],
            loads={str(source): Load(1.0, 0.0)},
            recent=Recent(metrics.registry).window(),
        )
    )
    assert hostile not in page
    assert page.count(html.escape(hostile)) == 9
    assert "not ready" in page


@pytest.mark.parametrize(
    "reading, word",
    [
        (HealthReading(has_started=False, is_live=True, is_ready=False, is_draining=False), "not ready"),
        (HealthReading(has_started=True, is_live=False, is_ready=False, is_draining=False), "the device does not work"),
        (HealthReading(has_started=True, is_live=True, is_ready=True, is_draining=False), "ready, without a model"),
        (HealthReading(has_started=True, is_live=True, is_ready=False, is_draining=True), "draining"),
    ],
)
def test_the_page_begins_with_the_answer_of_the_probes(reading, word):
    page = status_page.render(
        Status(
            version="1",
            tensorflow="2",
            device="CPU:0",
            started=0,
            health=reading,
            unready_reasons=[],
            session_store_problem="",
            entries=[],
            loads={},
            recent=Recent(Metrics().registry).window(),
        )
    )
    assert f"<title>forwardpass: {word}</title>" in page


def test_the_page_says_that_models_are_being_loaded():
    page = status_page.render(
        Status(
            version="1",
            tensorflow="2",
            device="CPU:0",
            started=0,
            health=HealthReading(has_started=False, is_live=True, is_ready=False, is_draining=False),
            unready_reasons=["the server is starting: its models are being loaded"],
            session_store_problem="",
            entries=[Entry(ModelSource("digits", 1), State.LOADING)],
            loads={},
            recent=Recent(Metrics().registry).window(),
        )
    )
    assert "<title>forwardpass: loading</title>" in page
