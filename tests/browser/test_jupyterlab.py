"""The notebooks as a reader meets them: JupyterLab in a browser, run through its menu."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import lab_driver
import nbformat
import pytest

pytestmark = pytest.mark.browser

IMAGES = """() => Array.from(document.querySelectorAll('.jp-OutputArea img'), image =>
  ({alt: image.alt, width: image.naturalWidth, shown: image.getBoundingClientRect().width}))"""

LOW_CONTRAST = """least => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const over = (top, bottom) => bottom.map((channel, i) => (top[3] ?? 1) * top[i] + (1 - (top[3] ?? 1)) * channel);
  const luminance = color => {
    const linear = share => share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    const [red, green, blue] = color.map(channel => linear(channel / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const background = element => element
    ? over(channels(getComputedStyle(element).backgroundColor), background(element.parentElement)) : [255, 255, 255];
  const found = [];
  for (const root of document.querySelectorAll('.jp-OutputArea .jp-RenderedHTMLCommon, .widget-html-content')) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
      if (!text || ['STYLE', 'SCRIPT'].includes(element.tagName)) continue;
      const below = background(element), ink = over(channels(getComputedStyle(element).color), below);
      const [dark, light] = [luminance(ink), luminance(below)].sort((a, b) => a - b);
      const ratio = (light + 0.05) / (dark + 0.05);
      if (ratio < least) found.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}, [${ink}] on [${below}]`);
    }
  }
  return found;
}"""


class TestEveryNotebook:
    def test_runs_to_its_end(self, in_lab):
        state = in_lab.page.evaluate(lab_driver.STATE)
        assert state["errors"] == []
        assert state["counts"] == list(range(1, len(state["counts"]) + 1))

    def test_shows_every_picture_with_its_words(self, in_lab, notebook_path):
        images = in_lab.page.evaluate(IMAGES)
        committed = nbformat.read(notebook_path, as_version=4)
        outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
        assert len(images) >= sum("image/png" in output.get("data", {}) for output in outputs) > 0
        for image in images:
            assert min(image["width"], image["shown"]) > 0, image
            assert len(image["alt"]) > 40, image

    def test_asks_no_other_host(self, in_lab):
        assert any("/api/kernels/" in url for url in in_lab.requests)
        assert in_lab.foreign_requests() == []

    @pytest.mark.parametrize("theme", lab_driver.THEMES)
    def test_text_stands_out_from_its_ground(self, in_lab, theme):
        in_lab.use_theme(theme)
        assert in_lab.page.evaluate(LOW_CONTRAST, 4.5) == []


@lab_driver.only("02")
class TestStepper:
    @pytest.fixture
    def stepper(self, in_lab):
        return in_lab.page.locator(".jp-OutputArea-output", has=in_lab.page.locator(".widget-play")).first

    @pytest.fixture
    def recorded(self, stepper):
        return stepper.locator(".widget-html-content").first

    @staticmethod
    def _step(recorded):
        return int(re.search(r"step (\d+) \(", recorded.inner_text())[1])

    def test_the_slider_moves_it(self, stepper, recorded):
        before = recorded.inner_text()
        stepper.get_by_role("slider").first.press("ArrowRight")
        recorded.get_by_text("step 1 (decode)").wait_for()
        stepper.get_by_role("slider").first.press("End")
        recorded.get_by_text("stops: length").wait_for()
        assert recorded.inner_text() != before

    def test_the_buttons_move_it(self, stepper, recorded):
        stepper.get_by_role("slider").first.press("Home")
        recorded.get_by_text("step 0 (prefill)").wait_for()
        stepper.get_by_role("button", name="next").click()
        recorded.get_by_text("step 1 (decode)").wait_for()
        stepper.get_by_role("button", name="previous").click()
        recorded.get_by_text("step 0 (prefill)").wait_for()

    def test_it_plays(self, stepper, recorded):
        stepper.get_by_role("slider").first.press("Home")
        recorded.get_by_text("step 0 (prefill)").wait_for()
        stepper.locator(".widget-play button").first.click()
        recorded.get_by_text("step 2 (decode)").wait_for()
        stepper.locator(".widget-play button").first.click()

    def test_another_temperature_weighs_the_logits_anew(self, stepper):
        weighed = stepper.locator(".widget-html-content").nth(1)
        assert "temperature" not in weighed.inner_text()
        stepper.get_by_role("slider").nth(1).press("End")
        weighed.get_by_text(re.compile("^temperature: ")).wait_for()


@lab_driver.only("05")
def test_the_slider_draws_another_map_of_the_pools(in_lab):
    view = in_lab.page.locator(".widget-interact")
    picture = view.locator("img")
    before = picture.get_attribute("alt")
    view.get_by_role("slider").press("ArrowRight")
    another = "([view, before]) => /^Map of .* tokens/.test(view.querySelector('img')?.alt.replace(before, ''))"
    in_lab.page.wait_for_function(another, arg=[view.element_handle(), before])


@lab_driver.only("index")
def test_the_table_of_contents_leads_to_every_notebook(in_lab):
    links = in_lab.page.locator(".jp-OutputArea h2 a")
    names = [f"{notebook.id}.ipynb" for notebook in lab_driver.NOTEBOOKS if notebook.id != "index"]
    assert [Path(urlsplit(link.get_attribute("href")).path).name for link in links.all()] == names
    links.last.click()
    in_lab.page.locator(".lm-TabBar-tabLabel", has_text=names[-1]).wait_for()
