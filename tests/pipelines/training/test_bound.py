"""The bound as a loss against literal formulas, and the recipe that weighs it."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.config import TokenizerRecipe
from pipelines.training.losses import Bound, Loss
from pipelines.training.losses.bound import mean_squared_error
from tests.tokenizer.tiny import (
    FSQ,
    HYBRID,
    KINDS,
    NETWORKS,
    make_tokenizer,
    random_images,
    seeded,
)
from tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput, hq_vae, rsq_vae, sq_vae, sq_vae_2
from tokenizer.builders import deterministic
from tokenizer.config import NetworkConfig

FAMILY = {
    "SQ-VAE": sq_vae(4, 6, 4, networks=NETWORKS),
    "SQ-VAE-2": sq_vae_2((8, 4, 2), 6, 4, networks=NETWORKS),
    "RSQ-VAE": rsq_vae(4, 3, 6, 4, networks=NETWORKS),
    "RSQ-VAE, one codebook": rsq_vae(4, 3, 6, 4, shares_codebook=True, networks=NETWORKS),
    "HQ-VAE": HYBRID,
}
GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer_tiny.json"
TEMPERATURE = 0.55


def loss_of(tokenizer: Tokenizer, images: Tensor, **recipe: Any) -> Loss:
    torch.manual_seed(5)
    bound = Bound(TokenizerRecipe(**recipe), tokenizer.has_posterior)
    return bound(images, tokenizer(images, TEMPERATURE))


def unpatched(patches: Tensor) -> Tensor:
    """(B, C·2·2, h, w) to (B, C, 2h, 2w), value by value."""
    batch, channels, height, width = patches.shape
    images = patches.new_zeros(batch, channels // 4, 2 * height, 2 * width)
    for channel, row, column in itertools.product(range(channels // 4), range(2), range(2)):
        images[:, channel, row::2, column::2] = patches[:, 4 * channel + 2 * row + column]
    return images


def literal_terms(tokenizer: Tokenizer, images: Tensor, weight: float) -> dict[str, Tensor]:
    """Every term from its formula, with the networks as black boxes; sums, then batch means."""
    torch.manual_seed(5)
    batch = len(images)
    error, entropies, state = torch.zeros(()).double(), [], None
    for group, features in zip(tokenizer.top_down, tokenizer.bottom_up(images), strict=True):
        upsampled = None if state is None else group.up(state)
        inputs = features if upsampled is None else torch.cat([upsampled, features], 1)
        latents = group.to_latents(inputs)
        variances = group.quantizer.log_variances.exp()
        residual, total = latents, torch.zeros_like(latents)
        for layer in range(group.quantizer.num_layers):
            codebook, s2 = group.quantizer.codebook(layer), variances[layer]
            differences = residual.permute(0, 2, 3, 1).unsqueeze(-2) - codebook  # (B, H, W, K, D)
            posterior = (-(differences**2).sum(-1) / (2 * s2)).softmax(-1)
            entropies.append(-(posterior * posterior.log()).sum() / batch)
            noise = seeded(int(torch.randint(2**62, ())))
            uniform = torch.empty_like(posterior).uniform_(2**-25, 1, generator=noise)
            gumbel = -torch.log(-uniform.log())
            weights = ((posterior.log() + gumbel) / TEMPERATURE).softmax(-1)
            mixture = torch.einsum("bhwk,kd->bdhw", weights, codebook)
            total, residual = total + mixture, residual - mixture
        error = error + ((latents - total) ** 2).sum() / batch / (2 * variances.sum())
        state = total if upsampled is None else upsampled + total
    squared_error = ((images - unpatched(tokenizer.decoder.layers(state))) ** 2).sum() / batch
    num_values = images[0].numel()
    reconstruction = num_values / 2 * torch.log(squared_error / num_values)
    entropy = torch.stack(entropies).sum()
    return {
        "loss": reconstruction + weight * (error - entropy),
        "reconstruction": reconstruction,
        "quantization_error": error,
        "posterior_entropy": entropy,
        "layer_entropy": torch.stack(entropies),
        "rmse": (squared_error / num_values).sqrt() / 2,  # on [0, 1]
    }


@pytest.mark.parametrize(
    ("config", "weight"),
    [*((config, None) for config in FAMILY.values()), (HYBRID, 0.0), (HYBRID, 1.0)],
)
def test_terms_and_gradients_equal_those_of_the_literal_formulas(
    config: TokenizerConfig, weight: float | None
) -> None:
    tokenizer, images = make_tokenizer(config), random_images()
    found = loss_of(tokenizer, images, latent_weight=weight)
    expected = literal_terms(tokenizer, images, 0.3 if weight is None else weight)
    torch.testing.assert_close(found.terms, expected)
    torch.testing.assert_close(found.minimized, expected["loss"] / (images[0].numel() / 2))
    parameters = list(tokenizer.parameters())
    gradients = torch.autograd.grad(found.terms["loss"], parameters)
    for first, second in zip(
        gradients, torch.autograd.grad(expected["loss"], parameters), strict=True
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_the_loss_of_a_baseline_is_the_usual_error_and_commitment(weight: float | None) -> None:
    tokenizer, images = make_tokenizer(deterministic(HYBRID)), random_images()
    loss = loss_of(tokenizer, images, latent_weight=weight)
    encoding = tokenizer.encode_with_latents(images)
    num_values, commitment = images[0].numel(), torch.zeros(()).double()
    for quantizer, latents, indices in zip(
        tokenizer.quantizers, encoding.latents, encoding.indices, strict=True
    ):
        total, depth = torch.zeros_like(latents), indices.shape[1]
        for layer in range(depth):
            total = total + quantizer.codebook(layer)[indices[:, layer]].permute(0, 3, 1, 2)
            commitment = commitment + ((latents - total) ** 2).mean() / depth
    error = (images - tokenizer.reconstruct(images)) ** 2
    weighted = (0.25 if weight is None else weight) * commitment
    torch.testing.assert_close(loss.minimized, error.mean() + weighted)
    torch.testing.assert_close(loss.terms["commitment"], num_values / 2 * weighted)
    torch.testing.assert_close(loss.terms["reconstruction"], error.sum() / len(images) / 2)


@pytest.mark.parametrize("config", [HYBRID, FSQ], ids=["stochastic", "fsq"])
@pytest.mark.parametrize("likelihood", [None, "closed_form", "unit_variance"])
def test_the_likelihood_is_the_recipes_or_that_of_the_kind(
    config: TokenizerConfig, likelihood: str | None
) -> None:
    tokenizer, images = make_tokenizer(config), random_images()
    terms = loss_of(tokenizer, images, likelihood=likelihood).terms
    num_values, mean_squared_error = images[0].numel(), (2 * terms["rmse"]).square()
    is_closed_form = likelihood == "closed_form" or (likelihood is None and config is HYBRID)
    value = mean_squared_error.log() if is_closed_form else mean_squared_error
    torch.testing.assert_close(terms["reconstruction"], num_values / 2 * value)


@pytest.mark.parametrize("num_parts", [2, 3])
@pytest.mark.parametrize("error", [0.0, 1e-7, 1.0])  # 1e-7 lies below the smallest variance
@pytest.mark.parametrize("likelihood", ["closed_form", "unit_variance"])
def test_parts_of_a_batch_give_its_value_and_gradient_together(
    likelihood: Any, error: float, num_parts: int
) -> None:
    images = random_images(batch=6)
    reconstructions = (images + error * random_images(2, batch=6)).requires_grad_()
    bound = Bound(TokenizerRecipe(likelihood=likelihood), has_posterior=True)

    def output(rows: slice) -> TokenizerOutput:
        decoded = reconstructions[rows]
        terms = {"quantization_error": decoded.square().mean()}
        return TokenizerOutput(decoded, [], torch.zeros(1).double(), terms)

    everything = slice(0, 6)
    batch_error = mean_squared_error(images, output(everything)).detach()
    whole = bound(images, output(everything))
    parts = [
        bound(images[rows], output(rows), batch_error)
        for rows in (slice(first, first + 6 // num_parts) for first in range(0, 6, 6 // num_parts))
    ]
    minimized = torch.stack([part.minimized for part in parts]).mean()
    torch.testing.assert_close(minimized, whole.minimized)
    (expected,) = torch.autograd.grad(whole.minimized, reconstructions)
    (found,) = torch.autograd.grad(minimized, reconstructions)
    torch.testing.assert_close(found, expected)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "config", [*FAMILY.values(), KINDS["nearest"], FSQ], ids=[*FAMILY, "nearest", "fsq"]
)
def test_every_parameter_gets_a_gradient(config: TokenizerConfig) -> None:
    networks = NETWORKS.model_copy(update={"attention_downsampling": (4,)})
    tokenizer = make_tokenizer(config.model_copy(update={"networks": networks}))
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "project_in" in name:  # the small latents of the start are all rounded to zero
                parameter.mul_(20)
    loss_of(tokenizer, random_images()).minimized.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_terms_stay_in_float32_under_autocast(kind: str) -> None:
    tokenizer, images = make_tokenizer(KINDS[kind]).float(), random_images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(tokenizer, images)
    for name, value in {**loss.terms, "minimized": loss.minimized}.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
    loss.minimized.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_error_of_hard_reconstructions(kind: str) -> None:
    networks = NetworkConfig(width=16, max_width=16, num_blocks=1)
    config = KINDS[kind].model_copy(update={"networks": networks})
    tokenizer, recipe, steps = Tokenizer(config), TokenizerRecipe(), 80
    coarse = torch.rand(4, 3, 2, 2)
    images = 2 * torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear") - 1
    tokenizer.initialize_from_data(images, seeded())
    before = (tokenizer.reconstruct(images) - images).square().mean()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    bound = Bound(recipe, tokenizer.has_posterior)
    for step in range(steps):
        optimizer.zero_grad()
        output = tokenizer(images, recipe.temperature(step, steps))
        bound(images, output).minimized.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 0.5)
        optimizer.step()
        tokenizer.after_step()
    after = (tokenizer.reconstruct(images) - images).square().mean()
    assert after < 0.3 * before


@settings(max_examples=50)
@given(
    initial=st.floats(0.01, 10),
    final=st.floats(0.01, 10),
    hold=st.floats(0, 0.99),
    total_steps=st.integers(2, 10_000),
    data=st.data(),
)
def test_the_temperature_is_held_then_goes_exponentially_from_initial_to_final(
    initial: float, final: float, hold: float, total_steps: int, data: st.DataObject
) -> None:
    recipe = TokenizerRecipe(
        initial_temperature=initial, final_temperature=final, temperature_hold=hold
    )
    assert recipe.temperature(0, 1) == recipe.temperature(0, total_steps) == pytest.approx(initial)
    assert recipe.temperature(total_steps - 1, total_steps) == pytest.approx(final)
    assert recipe.temperature(2 * total_steps, total_steps) == pytest.approx(final)
    step = data.draw(st.integers(0, total_steps - 1))
    share = max(step / (total_steps - 1) - hold, 0.0) / (1 - hold)
    expected = math.exp((1 - share) * math.log(initial) + share * math.log(final))
    assert recipe.temperature(step, total_steps) == pytest.approx(expected)


def test_the_first_losses_are_the_golden_ones() -> None:
    """Five training steps in float64, and one evaluation. A change needs an entry for users."""
    tokenizer = make_tokenizer(hq_vae((8, 4), (2, 1), 8, 4, networks=NETWORKS))
    images, recipe = random_images(batch=4), TokenizerRecipe()
    tokenizer.initialize_from_data(images, seeded(2))
    bound = Bound(recipe, has_posterior=True)
    optimizer = torch.optim.SGD(tokenizer.parameters(), 1e-2)
    torch.manual_seed(3)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = bound(images, tokenizer(images, recipe.temperature(step, 10)))
        loss.minimized.backward()
        optimizer.step()
        losses.append(loss.terms["loss"].item())
    losses.append(bound(images, tokenizer.eval()(images)).terms["loss"].item())
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-6)
