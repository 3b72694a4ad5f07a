"""A loss of stage one from outside the package is what the run minimizes and logs."""

import inspect
from pathlib import Path

from torch import Tensor

from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss, TokenizerLoss
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.tiny_runs import logged, tokenizer_run
from tests.tokenizer.tiny import random_images
from tokenizer import Tokenizer, TokenizerOutput


class AbsoluteError:
    """A Laplace decoder in place of the Gaussian one."""

    def __call__(self, images: Tensor, output: TokenizerOutput) -> Loss:
        error = (images - output.reconstructions).abs().mean()
        latents = sum(output.latent_terms.values()) - output.layer_entropy.sum()
        loss = error + 1e-3 * latents
        return Loss(loss, {"loss": loss, "absolute_error": error, **output.latent_terms})


def test_a_loss_from_outside_is_minimized_and_its_terms_are_logged(
    tmp_path: Path, cache_dir: Path
) -> None:
    assert len(inspect.getsource(AbsoluteError).splitlines()) <= 40
    loss = AbsoluteError()
    assert isinstance(loss, TokenizerLoss)
    config = tokenizer_run(tmp_path / "run", cache_dir)
    accelerator = make_accelerator(config)
    stage = TokenizerStage(config, accelerator, loss=loss)
    train(stage, config, accelerator)
    lines = [line for line in logged(config.output_dir) if line["phase"] == "train"]
    assert lines
    for line in lines:
        assert line["absolute_error"] > 0
        assert {"quantization_error", "temperature", "dequantization_variance"} <= line.keys()
        assert not {"reconstruction", "posterior_entropy", "rmse"} & line.keys()  # the bound's
    tokenizer = Tokenizer.from_pretrained(config.output_dir / "model")
    assert tokenizer.reconstruct(random_images().float()).isfinite().all()
