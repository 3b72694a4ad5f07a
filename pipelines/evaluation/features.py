"""Feature extractors: the networks whose features the distances of `metrics.py` compare."""

import io
import logging
import pickle
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipelines.command_configs import ExtractorConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import file_sha256, replace_file
from tokenizer.storage.hashes import weights_hash
from tokenizer.storage.pretrained import load_weights
from tokenizer.storage.untrusted import load_safetensors

logger = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)

# Names under which results are known; any other model goes by its timm name.
DISPLAY_NAMES = {"mobilenetv2_100": "MobileNetV2"}


class FeatureOutput(NamedTuple):
    """What an extractor gives, or a whole set's worth of it."""

    features: Float[Tensor, "batch dim"]
    """Pooled features before the classifier, float32."""
    logits: Float[Tensor, "batch classes"]
    """Of the classifier; Inception's are without bias, as the Inception Score has them."""


class FeatureExtractor(nn.Module):
    """A frozen network from uint8 images to features; always in evaluation mode and float32.

    Gray images are repeated to three channels. Alpha is composited on white before.
    """

    def __init__(self, network: nn.Module, name: str, protocol: dict[str, str | int | float]):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.protocol = {
            "extractor": name,
            **protocol,
            "gray_images": "repeated to 3 channels",
            "alpha": "composited on white",
        }

    @property
    def suffix(self) -> str:
        """What follows a metric's name: nothing for Inception, "-MobileNetV2" and so on else."""
        return "" if self.name == "Inception" else f"-{self.name}"

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in evaluation mode, whatever contains it."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> FeatureOutput:
        """Features and logits, without gradient and outside any autocast."""
        if images.shape[1] in (2, 4):
            images = composite_on_white(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            output = self._extract(images.expand(-1, 3, -1, -1))
        return FeatureOutput(output.features.float(), output.logits.float())

    def _extract(self, images: Tensor) -> FeatureOutput:
        raise NotImplementedError


def composite_on_white(
    images: UInt8[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch colors height width"]:
    """Gray or RGB from the same with alpha, the last channel."""
    colors, alpha = images[:, :-1].int(), images[:, -1:].int()
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


class InceptionExtractor(FeatureExtractor):
    """Inception v3 of 2015 as torch-fidelity has it: 2,048 features, resized to 299 inside.

    Only the published weights, known by their SHA-256, carry the name "Inception" and so give
    "FID". Other weights of this architecture are named by their hash: "Inception-0a1b2c3d".

    Raises:
        InputError: the weights are absent and cannot be had, or are not Inception's.
    """

    def __init__(self, weights: Path | None = None) -> None:
        path = _fetch_inception() if weights is None else weights
        if not path.is_file():
            raise InputError(f"weights: {path}: no such file; FID needs {INCEPTION_FILE} there")
        sha256 = file_sha256(path)
        if weights is None and sha256 != INCEPTION_SHA256:
            raise InputError(f"{path} is damaged: its SHA-256 is {sha256}; delete it and run again")
        name = "Inception"
        if sha256 != INCEPTION_SHA256:
            name = f"Inception-{sha256[:8]}"
            logger.warning("%s is not %s: reported as %s, not FID", path, INCEPTION_FILE, name)
        super().__init__(
            _load_inception(path),
            name,
            {
                "model": "InceptionV3 (2015-12-05), 2048 features, logits without bias",
                "weights": path.name,
                "weights_sha256": sha256,
                "resize": "bilinear as in TensorFlow 1, not antialiased",
                "image_size": 299,
            },
        )

    def _extract(self, images: Tensor) -> FeatureOutput:
        return FeatureOutput(*self.network(images))


class TimmExtractor(FeatureExtractor):
    """Any classifier of timm; the distances carry its name and are never FID.

    Raises:
        InputError: timm has no such model, or none that takes such images; the weights are
            absent, do not fit or cannot be downloaded.
    """

    def __init__(self, config: ExtractorConfig) -> None:
        network = _load_timm(config)
        entry = network.pretrained_cfg
        mean, std = config.mean or entry["mean"], config.std or entry["std"]
        if config.weights is None:
            # There is no one file to hash: the tensors stand for it.
            source = f"timm/{entry['architecture']}.{entry.get('tag')} (hash over the tensors)"
            sha256 = weights_hash(network.state_dict())
        else:
            source, sha256 = config.weights.name, file_sha256(config.weights)
        super().__init__(
            network,
            DISPLAY_NAMES.get(config.model.partition(".")[0], config.model),
            {
                "model": config.model,
                "pad_type": config.pad_type,
                "weights": source,
                "weights_sha256": sha256,
                "resize": "bicubic, antialiased, to a square",
                "image_size": config.image_size,
                "mean": ", ".join(f"{value:g}" for value in mean),
                "std": ", ".join(f"{value:g}" for value in std),
            },
        )
        self.image_size = config.image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        try:
            self(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
        except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
            raise InputError(
                f"model {config.model!r} gives no pooled features at image_size "
                f"{config.image_size}: {_one_line(error)}"
            ) from error

    def _extract(self, images: Tensor) -> FeatureOutput:
        side = (self.image_size, self.image_size)
        resized = F.interpolate(images / 255, side, mode="bicubic", antialias=True)
        network: Any = self.network
        feature_map = network.forward_features((resized - self.mean) / self.std)
        return FeatureOutput(
            network.forward_head(feature_map, pre_logits=True), network.forward_head(feature_map)
        )


def load_extractor(config: ExtractorConfig) -> FeatureExtractor:
    """The extractor that `config` asks for, on the CPU; nothing falls back to another one.

    Raises:
        InputError: it cannot be had; the line says which file to put where. Or none is asked for.
    """
    if config.kind == "none":
        raise InputError("extractor.kind must not be 'none' where distances are measured")
    if config.kind == "timm":
        return TimmExtractor(config)
    return InceptionExtractor(config.weights)


def _fetch_inception() -> Path:
    """Where torch-fidelity keeps its weights, after downloading them if need be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path

    def download(temporary: Path) -> None:
        # torch.hub's own download has no time limit: it hangs where packets are dropped.
        answer = urllib.request.urlopen(INCEPTION_URL, timeout=30)
        with answer, temporary.open("wb") as file:
            shutil.copyfileobj(answer, file)
        if file_sha256(temporary) != INCEPTION_SHA256:
            raise OSError("what came is another file")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, download)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"FID needs {INCEPTION_FILE}, whose download failed ({_one_line(error)}): get it from "
            f"{INCEPTION_URL} and put it at {path}, or give its path as extractor.weights"
        ) from error
    return path


def _load_inception(path: Path) -> nn.Module:
    # Imported here: it takes seconds, and only Inception needs it.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or holds more than weights") from error
    # torch-fidelity unpickles whatever it is given, so it gets only what has just been checked.
    checked = io.BytesIO()
    torch.save(weights, checked)
    checked.seek(0)
    layers = ["2048", "logits_unbiased"]
    try:
        return FeatureExtractorInceptionV3("inception", layers, checked)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no Inception weights: {_one_line(error)}") from error


def _load_timm(config: ExtractorConfig) -> Any:
    options: dict[str, Any] = {"pad_type": config.pad_type} if config.pad_type else {}
    try:
        network = timm.create_model(config.model, pretrained=False, **options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"model: {_one_line(error)}, got {config.model!r}") from error
    except TypeError as error:
        raise InputError(f"model {config.model!r} takes no pad_type: {_one_line(error)}") from error
    if config.weights is not None:
        load_weights(network, load_safetensors(config.weights), str(config.weights))
        return network
    try:
        return timm.create_model(config.model, pretrained=True, **options)
    except Exception as error:  # what the hub's client raises is no closed set
        raise InputError(
            f"the download of {config.model!r} failed ({_one_line(error)}): "
            "give a .safetensors file as extractor.weights"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
