"""`ImageGenerationPipeline`: a trained tokenizer and prior, for people who want images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.completion import CompletionPipeline, SamplingOptions
from pipelines.drawing import ConditionInputs, Labels
from pipelines.images import Output, OutputImages, check_output, to_output
from pipelines.known import seed_of
from pipelines.sampling_config import SamplingConfig
from prior.sampling import NUM_CANDIDATES
from tokenizer.fields import check_whole

__all__ = ["ImageGenerationPipeline", "SamplingConfig"]


class ImageGenerationPipeline(CompletionPipeline):
    """Images from noise: the prior draws code indices, the tokenizer decodes them.

    And from pictures: codes, features and reconstructions (see `TokenizerPipeline`), and
    completions (see `CompletionPipeline`).

    Raises:
        InputError: the prior was not trained over the codes of this tokenizer.
    """

    def __call__(
        self,
        num_images: int,
        labels: Labels = None,
        seed: int = 0,
        *,
        generator: torch.Generator | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        guidance_scale: float | None = None,
        condition: ConditionInputs | None = None,
        known: Sequence[Tensor] | None = None,
        num_candidates: int = NUM_CANDIDATES,
        batch_size: int = 64,
        progress: bool = True,
        output: Output = "pil",
    ) -> OutputImages:
        """Generates images; image i depends on `seed`, i, its condition and known codes alone.

        Args:
            num_images: how many.
            labels: a class for all, or one for each image, by number or name; None takes the
                classes in turn.
            seed: of all random numbers.
            generator: gives the seed instead: one number is drawn from it.
            temperature: > 0; below 1 gives likelier codes. A number, or one per layer. None, here
                and for top_p and guidance_scale: as tuned for this prior (`hqvae tune-sampling`),
                else 1.
            top_k: draw from the k likeliest codes only. A number, or one per layer.
            top_p: draw from the smallest set of this probability only, 1 from all. A number, or one
                per layer.
            guidance_scale: classifier-free guidance; 1 = off.
            condition: instead of labels, for all images or for each: a text, a dictionary of
                attributes, a vector, tokens; whatever the prior's conditioner takes.
            known: indices to keep, per group (num_images, depth, h, w), -1 where to draw. The
                rest is drawn given all of them: exactly where they come first in the prior's order
                (a whole coarser map in coarse_to_fine), elsewhere (in the cell order) approximately
                by weighing candidates.
            num_candidates: of each image where known codes come after drawn ones: so many times the
                work. The more, the nearer to the true conditional distribution; with 1 known codes
                that come later are not seen.
            batch_size: images, or candidates for them, at a time; changes memory and speed alone.
            progress: show a bar.
            output: "pil": a list of Pillow images; "np": one uint8 array (B, H, W, C); "pt", or
                "tensor": one uint8 tensor (B, C, H, W).

        Raises:
            InputError: an argument is out of range.
        """
        check_output(output)
        check_whole("num_images", num_images, 1)
        options = SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
            num_candidates=num_candidates,
            batch_size=batch_size,
            progress=progress,
        )
        inputs = self._inputs(labels, condition, range(num_images))
        images = self._sample(num_images, inputs, seed_of(seed, generator), known, options)
        return to_output(images, output)
