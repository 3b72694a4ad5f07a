"""The decoder alone, for the training loop: stage one with codes that stay as they are."""

from accelerate import Accelerator

from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.run.checkpoints import newest_sources
from pipelines.training.losses import TokenizerLoss
from pipelines.training.tokenizer_stage import TokenizerStage
from tokenizer import Tokenizer
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import load_weights

CODES = "tokenizer codes"


class DecoderStage(TokenizerStage):
    """What the loop has to know to fine-tune the decoder of `config.tokenizer_dir`.

    In evaluation mode the tokenizer quantizes to the nearest codes, as its users do. All its
    parameters but the decoder's are frozen, so that encoding keeps no activations.

    Args:
        config: The run.
        accelerator: Its processes.
        images: For training and validation.
        quantizer: Builds quantizers from outside the package, see `Tokenizer`.
        loss: Takes the place of the recipe's.

    Raises:
        InputError: the tokenizer's codes are others than those that this run began with.
    """

    def __init__(
        self,
        config: TokenizerRunConfig,
        accelerator: Accelerator,
        images: tuple[ImageDataset, ImageDataset],
        *,
        quantizer: BuildQuantizer | None = None,
        loss: TokenizerLoss | None = None,
    ) -> None:
        super().__init__(config, accelerator, images, quantizer=quantizer, loss=loss)
        self.sources = {**self.sources, CODES: self.model.identity_hash()}
        saved = newest_sources(config.output_dir)
        if saved is not None and saved.get(CODES) != self.sources[CODES]:
            raise InputError(
                f"RUN: the codes of {config.tokenizer_dir} have changed since {config.output_dir} "
                "began; move that folder away to fine-tune anew"
            )

    def build(self, config: TokenizerRunConfig, quantizer: BuildQuantizer | None) -> Tokenizer:
        """The tokenizer of the run, perhaps with a new head, all but its decoder frozen."""
        folder = config.tokenizer_dir / "model"
        original = Tokenizer.from_pretrained(folder, quantizer=quantizer)
        networks = {"networks": config.tokenizer.networks}
        saved_config = self.saved_config(original.config.model_copy(update=networks))
        model = Tokenizer(saved_config, quantizer)
        weights = {**model.state_dict(), **original.state_dict()}  # a new head keeps its own
        load_weights(model, weights, str(folder))
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)
        model.take_place_of(original)
        self.is_initialized = True
        return model.eval()

    def after_step(self, accelerator: Accelerator) -> None:
        """The codebooks stay; the averages of the discriminator's outputs move."""
        if self.adversary is not None:
            self.adversary.after_step()
