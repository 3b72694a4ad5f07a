"""Models that are shared by way of a hub: what goes up, what comes down, what is refused."""

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import ImageGenerationPipeline, TokenizerPipeline
from pipelines.hub import find_folder
from tests.pipelines.hub_server import COMMIT, Hub, serving
from tokenizer.storage.errors import InputError

WEIGHTS = [f"{model}/{file}" for model in ("prior", "tokenizer") for file in ("config", "model")]
FILES = {
    "README.md",
    *(f"{p}.{'json' if p.endswith('config') else 'safetensors'}" for p in WEIGHTS),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, str(tmp_path / "hub")) as server:
        yield server


def test_a_pipeline_goes_up_and_comes_down_as_it_was(
    hub: Hub, pipeline: ImageGenerationPipeline
) -> None:
    address = pipeline.push_to_hub("user/model", token="secret")
    assert address == f"{hub.address}/user/model"
    assert set(hub.models["user/model"]) == FILES
    hub.models["user/model"]["prior/code.py"] = b"import this"
    hub.models["user/model"]["pytorch_model.bin"] = b"pickle"
    loaded = ImageGenerationPipeline.from_pretrained("user/model", device="cpu")
    draw = functools.partial(ImageGenerationPipeline.__call__, num_images=3, progress=False)
    assert torch.equal(draw(loaded, output="pt"), draw(pipeline, output="pt"))
    fetched = {path.split("/resolve/")[1] for path in hub.asked if "/resolve/" in path}
    assert fetched == {f"{COMMIT}/{name}" for name in FILES - {"README.md"}} | {"main/README.md"}
    alone = TokenizerPipeline.from_pretrained("user/model", revision="main", dtype=torch.float16)
    assert alone.tokenizer.has_hash(pipeline.tokenizer.content_hash())


def test_a_card_is_the_hubs_or_that_of_the_folder_or_a_new_one(
    hub: Hub, pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("# Filled in")
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "saved")
    for name, expected in (("filled", b"# Filled in"), ("kept", b"# Written there")):
        files = hub.models.setdefault(f"user/{name}", {})
        if name == "kept":
            files["README.md"] = expected
        loaded.push_to_hub(f"user/{name}", token="secret")
        assert files["README.md"] == expected
        assert set(files) == FILES


def test_what_came_down_once_loads_without_a_network(
    hub: Hub, pipeline: ImageGenerationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.push_to_hub("user/model", token="secret")
    ImageGenerationPipeline.from_pretrained("user/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.models.clear()
    loaded = ImageGenerationPipeline.from_pretrained("user/model")
    assert loaded.prior.content_hash() == pipeline.prior.content_hash()
    with pytest.raises(InputError, match=r"user/other is no folder here, and .* HF_HUB_OFFLINE"):
        ImageGenerationPipeline.from_pretrained("user/other")
    with pytest.raises(InputError, match=r"user/model: not uploaded: .* HF_HUB_OFFLINE is set"):
        pipeline.push_to_hub("user/model", token="secret")


def test_a_hub_that_is_down_is_said_on_one_line(
    hub: Hub, pipeline: ImageGenerationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"user/model is no folder here, and .*refused") as caught:
        TokenizerPipeline.from_pretrained("user/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "user/none"}, "user/none is no folder here, and the hub has no such model"),
        ({"folder": "none"}, "none holds no Tokenizer: there is no config.json"),
        ({"folder": Path("user/model")}, "user/model holds no Tokenizer"),
        ({"folder": "user/empty"}, "tokenizer holds no Tokenizer|empty.* holds no Tokenizer"),
        ({"folder": ".", "revision": "main"}, "revision must be None for a folder, got 'main'"),
    ],
)
def test_a_name_that_is_nowhere_is_refused_on_one_line(
    hub: Hub, arguments: dict[str, Any], message: str
) -> None:
    hub.models["user/empty"] = {"weights.bin": b""}
    for kind in (ImageGenerationPipeline, TokenizerPipeline):
        with pytest.raises(InputError, match=message) as caught:
            kind.from_pretrained(**arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [None, 5])
def test_what_is_no_name_of_a_folder_is_refused_by_the_name_of_the_argument(folder: Any) -> None:
    bare = inspect.unwrap(find_folder)  # without the tests' type checker
    with pytest.raises(InputError, match=f"^folder must be .* got {folder}$"):
        bare(folder, ("tokenizer",))


def test_a_folder_comes_before_a_model_of_the_hub(
    hub: Hub,
    pipeline: ImageGenerationPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("user/model")
    ImageGenerationPipeline.from_pretrained("user/model")
    assert not hub.asked
