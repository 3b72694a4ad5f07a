"""The page of `hqvae app` in a real browser; `make test-browser` installs what it needs."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.images import to_uint8
from prior import AttributeConditionConfig, Prior, PriorConfig
from prior.config import AttributeConfig, PriorNetworkConfig
from tests.image_files import noise
from tokenizer import Tokenizer
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None or not all(map(importlib.util.find_spec, ("gradio", "playwright"))),
        reason="needs Gradio, Playwright and Chromium",
    ),
]


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of the page of a run, which ends as Ctrl-C would end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.app", run, "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = f"http://127.0.0.1:{port}/"
        assert line == f"open {address} (Ctrl-C ends)\n", process.communicate()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, Chromium has no sandbox; it sees nothing but our own page.
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab that is to ask no other host than ours for anything, and to find no error."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(60_000)
    hosts, errors = set(), []
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    yield tab
    assert hosts - {""} == {"127.0.0.1"}  # "": of data: and blob:
    assert errors == []


def button(page: Any, name: str) -> Any:
    """The button of this name in the tab that is open."""
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def pictures(page: Any, gallery: str) -> Any:
    return page.locator(f"#{gallery} .thumbnail-item img, #{gallery} .gallery-item img")


def save_screenshot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(300)  # pictures fade in
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def downloaded(page: Any, locator: Any) -> np.ndarray:
    """Pixels of a picture of the page."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(locator.get_attribute("src")).body())))


def test_a_visitor_samples_reconstructs_changes_a_code_and_redraws(
    tiny_run: Path, pipeline: ImageGenerationPipeline, page: Any, tmp_path: Path
) -> None:
    Image.fromarray(noise(40, 32)).save(tmp_path / "picture.png")
    with served(tiny_run) as address:
        page.goto(address)

        button(page, "Draw").click()
        pictures(page, "samples").nth(7).wait_for()
        save_screenshot(page, "samples")

        page.get_by_role("tab", name="A picture and its codes").click()
        page.locator("#picture input[type=file]").set_input_files(tmp_path / "picture.png")
        pictures(page, "layers").nth(3).wait_for()
        assert page.locator("#layers").inner_text().count("RMSE") == 3
        page.locator("#map img").click(position={"x": 40, "y": 40})
        page.get_by_text("Layer 1, row 1, column 1").wait_for()
        assert not downloaded(page, page.locator("#changed img")).any()
        pictures(page, "offered").last.click()
        page.get_by_text("Changes so far").wait_for()
        assert downloaded(page, page.locator("#changed img")).max() == 255
        save_screenshot(page, "codes")
        button(page, "Take back all changes").click()
        page.get_by_text("Nothing is changed yet").wait_for()

        page.get_by_role("tab", name="Redraw a part").click()
        button(page, "Redraw").click()
        page.get_by_text("a picture must be there first").wait_for()
        page.locator("#canvas input[type=file]").first.set_input_files(tmp_path / "picture.png")
        page.get_by_text("This is what the networks see of it").wait_for()
        paint(page)
        button(page, "Redraw").click()
        pictures(page, "redrawn").nth(3).wait_for()
        prepared = to_uint8(pipeline.preprocess(tmp_path / "picture.png"))[0].movedim(0, -1).numpy()
        changed = downloaded(page, pictures(page, "redrawn").first) != prepared
        assert changed[4:8, 4:8].any()
        assert not changed[12:].any()
        assert not changed[:, 12:].any()
        save_screenshot(page, "redraw")

        page.get_by_role("tab", name="What the codes draw").click()
        button(page, "Show").click()
        pictures(page, "codebook").nth(7).wait_for()
        save_screenshot(page, "codebook")
        page.close()  # or it would miss the server


@pytest.fixture
def attributed(tmp_path: Path) -> Path:
    """Untrained models of pictures with alpha, and of two attributes."""
    networks = NetworkConfig(width=8, max_width=8, num_blocks=1)
    tokenizer = Tokenizer(hq_vae((8, 4), (1, 1), 8, 4, channels=4, networks=networks))
    config = PriorConfig(
        network=PriorNetworkConfig(width=16, num_spatial_layers=1, num_depth_layers=1, num_heads=2),
        code_maps=tokenizer.code_maps(16, 16),
        condition=AttributeConditionConfig(
            attributes=(
                AttributeConfig(name="color", values=("red", "green")),
                AttributeConfig(name="size", values=("small", "large")),
            )
        ),
        tokenizer_hash=tokenizer.content_hash(),
    )
    ImageGenerationPipeline(tokenizer, Prior(config)).save_pretrained(tmp_path / "attributed")
    return tmp_path / "attributed"


def test_attributes_are_chosen_and_what_is_redrawn_keeps_its_alpha(
    attributed: Path, page: Any, tmp_path: Path
) -> None:
    pipeline = ImageGenerationPipeline.from_pretrained(attributed)
    pixels = noise(16, 16, channels=4)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    with served(attributed) as address:
        page.goto(address)
        page.get_by_label("color (or any)").locator("visible=true").click()
        page.get_by_role("option", name="green").click()
        button(page, "Draw").click()
        pictures(page, "samples").nth(7).wait_for()
        expected = pipeline(8, condition="green", progress=False)
        for number, own in enumerate(expected):
            drawn = downloaded(page, pictures(page, "samples").nth(number))
            assert np.array_equal(drawn, np.asarray(own))
        save_screenshot(page, "attributes")

        page.get_by_role("tab", name="Redraw a part").click()
        page.locator("#canvas canvas").first.wait_for()
        page.wait_for_timeout(3000)  # before it is ready it would drop the picture
        page.locator("#canvas input[type=file]").first.set_input_files(tmp_path / "picture.png")
        page.get_by_text("This is what the networks see of it").wait_for()
        paint(page)
        button(page, "Redraw").click()
        pictures(page, "redrawn").nth(3).wait_for()
        redrawn = downloaded(page, pictures(page, "redrawn").first)
        change = np.abs(redrawn[12:].astype(int) - pixels[12:])
        assert not change[..., 3].any()
        # A browser multiplies colors by alpha, and rounds, before anything is uploaded.
        assert (change[..., :3] * (pixels[12:, :, 3:] / 255)).max() <= 1
        assert not np.array_equal(redrawn[:8], pixels[:8])
        save_screenshot(page, "redraw_alpha")
        page.close()  # or it would miss the server


def paint(page: Any) -> None:
    """From the upper left towards the middle of what is on the canvas, until the strokes show."""
    canvas = page.locator("#canvas canvas").first
    for _ in range(20):
        page.wait_for_timeout(1000)  # without a GPU, the canvas takes its time
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 160, y - 160)
        page.mouse.down()
        for step in range(1, 11):
            page.mouse.move(x - 160 + 15 * step, y - 160 + 15 * step)
        page.mouse.up()
        shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))
        if (shown == (255, 0, 90)).all(2).sum() > 1000:
            return
    pytest.fail("nothing is painted")


def test_without_a_prior_the_page_says_why_tabs_are_absent(tiny_run: Path, page: Any) -> None:
    with served(tiny_run / "tokenizer") as address:
        page.goto(address)
        page.get_by_text("this run has none").wait_for()
        names = page.get_by_role("tab").all_inner_texts()
        assert names == ["A picture and its codes", "What the codes draw"]
        save_screenshot(page, "without_prior")
        page.close()  # or it would miss the server
