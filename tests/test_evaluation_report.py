"""The HTML report, read as a browser shows it."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

import evaluation_report
from evaluation_report import write_cube_page, write_report, write_run_figure
from spectral_evaluation import HEADLINE, scene_bands, scene_metrics, summarise

NM = [float(nm) for nm in range(400, 701, 10)]
SIZE = (140, 200)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The files of an evaluation of two models with three scenes."""
    output = tmp_path_factory.mktemp("results")
    summaries, folders = [], []
    for name, noise in (("good", 0.01), ("rough", 0.05)):
        folder, records = output / name, []
        for part in ("hsi", "metrics", "photos", "scale"):
            (folder / part).mkdir(parents=True)
        for number in range(3):
            rng = np.random.default_rng(number)
            slope = np.linspace(0.2, 0.8, 31)[:, None, None]
            cube = (slope * rng.uniform(0.2, 1, SIZE)).astype(np.float32)
            pred = np.clip(cube + rng.normal(0, noise * (number + 1), cube.shape), 0, 1)
            pred = pred.astype(np.float32)
            scene = f"scene {number}"
            np.save(folder / "hsi" / f"{scene}.npy", pred)
            np.save(folder / "hsi" / f"{scene}_target.npy", cube)
            if name == "rough":
                np.save(folder / "scale" / f"{scene}.npy", np.full_like(cube, 0.05))
            Image.new("RGB", SIZE[::-1], (90, 120, 30)).save(folder / "photos" / f"{scene}.jpg")
            pair = torch.from_numpy(pred), torch.from_numpy(cube)
            record = {"scene_id": scene, "rgb_norm": "unit"}
            record |= scene_metrics(*pair, floor=1e-6, with_ssim=True)
            (folder / "metrics" / f"{scene}_metrics.json").write_text(json.dumps(record))
            parts = {"bands": scene_bands(*pair, 1e-6), "seconds": 1.0, "tile": None}
            records.append(record | parts | {"reliability": []})
        facts = {"name": name, "checkpoint": str(folder / "best.ckpt"), "split": "val"}
        facts |= {"data_root": "some <data> & more", "metric_floor": 1e-6, "wavelengths": NM}
        lines = [{"kind": "val", "step": step, "mrae": 1 / step} for step in (10, 20, 30)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        summaries.append(summarise(records, facts, folder))
        folders.append(folder)
    stress = [{"model": "good", "change": "as given", "mrae": 0.1, "rmse": 0.01, "sam": 2.0}]
    return write_report(output, summaries, folders, stress), summaries, folders


def test_the_report_needs_nothing_beside_itself(results):
    page, summaries, _ = results
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 30e6
    assert (
        "http://" not in text and "https://" not in text and "src=" not in text.split("<script")[0]
    )
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["headline"]["head"] == ["model", *HEADLINE]
    assert len(data["scenes"]["rows"]) == 6
    shown = [scene["why"] for scene in data["models"][0]["shown"]]
    assert shown == ["best", "2 of 3", "worst"]
    assert data["models"][1]["learning"] == {"steps": [10, 20, 30], "mrae": [0.1, 0.05, 1 / 30]}


def test_a_page_that_would_be_too_large_shows_fewer_scenes(monkeypatch):
    model = {"shown": [{"name": str(number), "text": "a" * 1000} for number in range(10)]}
    monkeypatch.setattr(evaluation_report, "MOST_BYTES", 5000)
    evaluation_report._leave_out_scenes([model])
    assert [scene["name"] for scene in model["shown"]] == ["0", "1", "8", "9"]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(params=[(1280, 1000), (390, 800)], ids=["desk", "phone"])
def page(browser, results, request):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.set_window_size(*request.param)
    browser.get(results[0].as_uri())
    ready = "return document.body.dataset.ready"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(ready))
    return browser


def plotted(page):
    return json.loads(page.find_element("id", "spectra").get_attribute("data-points"))


def sampled(folder, scene, kind, row, column):
    """The spectrum of the array's pixel that a pixel of the report's grid stands for."""
    cube = np.load(folder / "hsi" / f"{scene}{kind}.npy")
    y, x = (
        int((place + 0.5) * side / 128) for place, side in zip((row, column), SIZE, strict=True)
    )
    return cube[:, y, x]


def click(page, element, u, v, shift=False):
    """Click at the fractions (u, v) of an element."""
    from selenium.webdriver import ActionChains, Keys

    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    width, height = element.size["width"], element.size["height"]
    actions = ActionChains(page)
    if shift:
        actions.key_down(Keys.SHIFT)
    actions.move_to_element_with_offset(element, (u - 0.5) * width, (v - 0.5) * height).click()
    if shift:
        actions.key_up(Keys.SHIFT)
    actions.perform()


def test_a_clicked_pixels_spectra_are_those_of_the_arrays(page, results):
    folder = results[2][0]
    photo = page.find_elements("css selector", "canvas.pick")[0]
    click(page, photo, 0.3, 0.7)
    click(page, photo, 0.8, 0.2, shift=True)
    first, second = plotted(page)
    assert abs(first["column"] / 128 - 0.3) < 0.02 and abs(first["row"] / 128 - 0.7) < 0.02
    for point in (first, second):
        place = (point["row"], point["column"])
        for kind, key in (("", "predicted"), ("_target", "measured")):
            wanted = sampled(folder, "scene 0", kind, *place)
            np.testing.assert_allclose(point[key], wanted, atol=2e-4)


def test_a_second_pixel_can_be_chosen_without_a_keyboard(page):
    photo = page.find_elements("css selector", "canvas.pick")[0]
    page.find_element("id", "second").click()
    click(page, photo, 0.8, 0.2)
    first, second = plotted(page)
    assert first["column"] == 64 and abs(second["column"] / 128 - 0.8) < 0.02


def test_curves_of_several_models_say_whose_they_are(page):
    for name in ("bandmrae", "bandrmse", "curve"):
        said = page.find_elements("css selector", f"#{name}-legend span")
        assert [item.text for item in said] == ["good", "rough"]


def test_the_pictures_can_be_seen(page):
    picture = page.find_element("css selector", ".picture")
    pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot_as_png)).convert("RGB"))
    np.testing.assert_allclose(np.median(pixels, axis=(0, 1)), (90, 120, 30), atol=4)


def test_the_slider_the_keys_and_another_model_change_what_is_shown(page, results):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    slider = page.find_element("id", "band")
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 7)
    assert page.find_element("id", "nm").text == "470 nm"
    assert page.find_element("id", "bandimage").get_attribute("data-band") == "7"
    picture = page.find_elements("css selector", "canvas.pick")[2]
    before = plotted(page)[0]
    picture.send_keys(Keys.ARROW_DOWN)
    assert plotted(page)[0]["row"] == before["row"] + 1
    Select(page.find_element("id", "model")).select_by_visible_text("rough")
    Select(page.find_element("id", "scene")).select_by_index(2)

    def rough_is_shown(driver):
        point = plotted(driver)[0]
        wanted = sampled(results[2][1], "scene 2", "", point["row"], point["column"])
        return np.allclose(point["predicted"], wanted, atol=2e-4)

    WebDriverWait(page, 20).until(rough_is_shown)


def test_the_table_sorts_and_the_console_is_quiet(page):
    button = page.find_element("css selector", "#scenes th:nth-child(3) button")
    page.execute_script("arguments[0].click()", button)
    rows = page.find_elements("css selector", "#scenes tbody td:nth-child(3)")
    values = [float(cell.text) for cell in rows]
    assert values == sorted(values) and len(values) == 6
    pressed = page.switch_to.active_element  # drawn anew, and still the one that the keys reach
    assert pressed.text.startswith("MRAE")
    pressed.send_keys("\n")
    rows = page.find_elements("css selector", "#scenes tbody td:nth-child(3)")
    assert [float(cell.text) for cell in rows] == sorted(values, reverse=True)
    wide = page.execute_script(
        "return document.documentElement.scrollWidth > window.innerWidth + 2"
    )
    assert not wide
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []


def test_a_cube_alone_has_a_page_of_its_own(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    cube = np.linspace(0.1, 0.9, 31 * 80 * 90).reshape(31, 80, 90).astype(np.float32)
    photo = np.full((80, 90, 3), 90, np.uint8)
    write_cube_page(tmp_path / "a_preview.html", photo, cube, NM)
    browser.set_window_size(1000, 900)
    browser.get((tmp_path / "a_preview.html").as_uri())
    ready = "return document.body.dataset.ready"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(ready))
    click(browser, browser.find_elements("css selector", "canvas.pick")[1], 0.5, 0.25)
    (point,) = plotted(browser)
    assert (point["row"], point["measured"]) == (20, None)
    np.testing.assert_allclose(point["predicted"], cube[:, 20, point["column"]], atol=3e-4)
    assert not browser.find_element("id", "headline").is_displayed()
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_a_run_ends_with_a_picture_of_it(tmp_path, monkeypatch):
    lines = [{"kind": "train", "step": step, "mrae": 1 / step, "lr": 0.1} for step in (1, 2)]
    lines += [{"kind": "val", "step": 2, "mrae": None, "sam": 9.0}]
    drawn = []

    def keep(axis, x, y, *style, label, **more):
        drawn.append((label, x, y))
        return plot(axis, x, y, *style, label=label, **more)

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", keep)
    for count, axes in ((0, 0), (2, 2), (3, 3)):
        text = "".join(f"{json.dumps(line)}\n" for line in lines[:count])
        (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "tr')  # killed while it wrote
        drawn.clear()
        write_run_figure(tmp_path)
        picture = tmp_path / "run.png"
        assert picture.exists() == bool(axes)
        if axes:
            assert Image.open(picture).width == axes * 5 * 110
    assert ("training patches", [1, 2], [1.0, 0.5]) in drawn and ("", [2], [9.0]) in drawn
