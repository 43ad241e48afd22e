"""The pages in a real browser: they load without complaint or request, fit a phone, and print."""
import re

import pytest
from support import browser, results

pytest.importorskip("matplotlib")

from tilewise import report

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium or Chrome on this machine")

NARROW = 360
SPILLS = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
            && !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 90))"""
CONTRAST = """(() => {
  const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const f = c.match(/[\\d.]+/g).slice(0, 3).map(linear);
                       return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                        if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const words = 'h1,h2,h3,h4,p,li,strong,td,th,a,summary,figcaption,caption,dt,dd,code,svg text';
  return Math.min(...[...document.querySelectorAll(words)].map(e => {
    const s = getComputedStyle(e); return ratio(light(e.closest('svg') ? s.fill : s.color), light(ground(e))); }));
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    paths = results.write(folder, "attention", "memory", "decode", "sparse", "paper", "numerics", "traffic", "cpu")
    return report.write(paths, folder / "report")


@pytest.fixture(scope="module")
def chromium():
    running = browser.Browser(browser.find())
    yield running
    running.close()


def test_loads_without_complaint_or_request(chromium, page):
    chromium.open(page)
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.complaints == []
    assert chromium.ask("document.compatMode") == "CSS1Compat"
    assert chromium.ask("document.querySelectorAll('figure svg').length") > 10
    assert chromium.ask("[...document.querySelectorAll('figure svg')].every(s => s.clientWidth > 200 && s.clientHeight > 100)")
    assert chromium.ask("[...document.images].every(i => i.complete && i.naturalWidth)")
    chromium.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.ask("[...document.querySelectorAll('td')].every(t => t.clientHeight > 0)")


def test_fits_a_phone(chromium, page):
    chromium.open(page, NARROW, 780)
    assert chromium.ask("document.documentElement.scrollWidth") == NARROW
    assert chromium.ask(SPILLS) == []
    assert chromium.ask("[...document.querySelectorAll('.scroll')].some(s => s.scrollWidth > s.clientWidth)")
    heights = chromium.ask("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert min(heights) >= 9


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(chromium, page, dark):
    chromium.open(page, dark=dark)
    ground = "rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)"
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == ground
    assert chromium.ask(CONTRAST) >= 4.5


def test_prints(chromium, page):
    chromium.open(page, dark=True)
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
