"""A small classifier of a data set's own classes: features and labels where no weights are at hand.

It serves the demo, which may not download anything. Distances over its features carry its own
name, and what it says of a class stands beside its accuracy on real images.
"""

from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from pipelines.data.batches import BatchOrder
from pipelines.data.dataset import ImageDataset
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from pipelines.processes import seed_everything

ARCHITECTURE = "test_resnet"
"""A residual network of half a million parameters, made for small images."""
BATCH = 64
LEARNING_RATE = 3e-3


class ClassifierExtractor(FeatureExtractor):
    """Pooled features and class logits of the classifier."""

    def _extract(self, images: Tensor) -> FeatureOutput:
        return FeatureOutput(*_features_and_logits(self.network, images))


def train_classifier(
    dataset: ImageDataset, num_steps: int, accelerator: Accelerator, seed: int = 0
) -> ClassifierExtractor:
    """Trains on the data set's labels with a one-cycle rate; every process trains the same."""
    seed_everything(seed)
    network = timm.create_model(ARCHITECTURE, num_classes=len(dataset.class_names))
    network.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.1
    )
    order = BatchOrder(len(dataset), BATCH, seed)
    for step in range(num_steps):
        items, _ = order.at(step)
        images = dataset.images_at(items).to(accelerator.device)
        labels = torch.from_numpy(dataset.labels[items]).to(accelerator.device)
        _, logits = _features_and_logits(network, images)
        optimizer.zero_grad()
        accelerator.backward(functional.cross_entropy(logits, labels))
        optimizer.step()
        schedule.step()
    protocol: dict[str, str | int | float] = {
        "model": ARCHITECTURE,
        "trained_on": dataset.description,
        "trained_on_hash": dataset.fingerprint,
        "num_steps": num_steps,
        "batch_size": BATCH,
        "seed": seed,
    }
    return ClassifierExtractor(network, "OwnClassifier", protocol)


def _features_and_logits(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    feature_map = network.forward_features(images.float() / 127.5 - 1)
    features = network.forward_head(feature_map, pre_logits=True)
    return features, network.get_classifier()(features)
