"""Who may judge a tokenizer, and what its numbers have to say of its training."""

from pipelines.evaluation.features import FeatureExtractor
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError


def trained_by(tokenizer: Tokenizer) -> dict[str, str]:
    """For the protocol, what has taught the decoder beside squared error; often nothing."""
    settings = {}
    if tokenizer.former_identities():
        settings["decoder"] = "fine-tuned on hard codes"
    if tokenizer.config.loss_networks:
        settings["trained_with"] = ", ".join(tokenizer.config.loss_networks)
    return settings


def check_extractor(extractor: FeatureExtractor | None, tokenizer: Tokenizer) -> None:
    """A network that the tokenizer was trained with would judge its own features.

    Raises:
        InputError: it is the tokenizer's backbone, or a network of its perceptual loss.
    """
    if extractor is None:
        return
    for network in tokenizer.config.loss_networks:
        loss_name, sha256 = network.split(" ")
        model = str(extractor.protocol.get("model", "")).partition(".")[0]
        if (
            sha256 == extractor.protocol.get("weights_sha256")
            or loss_name.partition(".")[0] == model
        ):
            raise InputError(
                f"extractor.model must not be {model!r}, whose features the training compared: it "
                "would judge what it has taught; give another, or extractor.kind none"
            )
    backbone = tokenizer.config.backbone
    if backbone is None:
        return
    name = backbone.name.partition(".")[0]
    if str(extractor.protocol.get("model", "")).partition(".")[0] == name:
        raise InputError(
            f"extractor.model must not be {name!r}, the backbone of this tokenizer, which would "
            "judge its own features; give another, or extractor.kind none"
        )
