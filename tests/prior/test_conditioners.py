"""Laws of the built-in conditioners beyond a class: vectors, tokens, attributes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from prior import (
    AttributeConditionConfig,
    AttributeConfig,
    EmbeddingConditionConfig,
    EmbeddingConditioner,
    Prior,
    PriorConfig,
    PriorNetworkConfig,
    Tokens,
    sample,
    sample_generators,
)
from tests.prior.small_priors import (
    FLAT,
    PYRAMID,
    SINGLE,
    assert_close,
    cached_logits,
    decoder_of,
    every_logit,
    random_indices,
)
from tokenizer.storage.errors import InputError

ATTRIBUTES = AttributeConditionConfig(
    attributes=(
        AttributeConfig(name="color", values=("blue", "red")),
        AttributeConfig(name="tags", values=("indoor", "loud", "old")),
    )
)
CONDITIONS: dict[str, Any] = {
    "vectors": EmbeddingConditionConfig(dim=3),
    "tokens": EmbeddingConditionConfig(dim=3, num_tokens=4),
    "attributes": ATTRIBUTES,
}
KINDS = pytest.mark.parametrize("kind", list(CONDITIONS))


def make_prior(kind: str, code_maps: Any = PYRAMID, **network: Any) -> Prior:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_spatial_layers": 2, "num_depth_layers": 1, "num_heads": 2}
    config = PriorConfig(
        network=PriorNetworkConfig.model_validate({**sizes, **network}),
        code_maps=code_maps,
        condition=CONDITIONS[kind],
    )
    prior = Prior(config).eval()
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.mul_(6.0)
    return prior


def inputs_of(kind: str, batch: int = 4) -> Any:
    """Rows that differ."""
    if kind == "attributes":
        rows = [[0, 1, 0, 0, 0], [1, 0, 1, 1, 0], [-1, -1, 0, 1, 0], [0, 1, -1, -1, -1]]
        return torch.tensor(rows, dtype=torch.int8)[:batch]
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(batch, 3, generator=generator)
    if kind == "vectors":
        return vectors
    tokens = torch.randn(batch, 4, 3, generator=generator)
    return Tokens(tokens, torch.arange(4) < torch.tensor([[4], [1], [3], [2]])[:batch])


@KINDS
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_cached_logits_are_those_of_the_full_forward_and_rows_are_independent(
    kind: str, positions: str
) -> None:
    prior, inputs = make_prior(kind, positions=positions), inputs_of(kind)
    indices = random_indices(prior, 4)
    expected = every_logit(prior, indices, inputs)
    assert_close(cached_logits(decoder_of(prior, inputs, 4), indices), expected, 1e-4)
    together = prior.log_prob(indices, inputs)
    alone = [prior.log_prob([own[i : i + 1] for own in indices], inputs[[i]]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)
    changed = prior.log_prob(indices, inputs[[1, 0, 3, 2]])
    assert not torch.isclose(changed, together).any()


@KINDS
def test_a_saved_prior_needs_no_class_of_the_users_to_be_loaded(kind: str, tmp_path: Path) -> None:
    prior, inputs = make_prior(kind), inputs_of(kind)
    if isinstance(prior.conditioner, EmbeddingConditioner):
        prior.conditioner.standardize_by(5 + 3 * torch.randn(50, 3))
    prior.save_pretrained(tmp_path)
    copy = Prior.from_pretrained(tmp_path)
    assert copy.config == prior.config
    indices = random_indices(prior, 4)
    assert torch.equal(copy.log_prob(indices, inputs), prior.log_prob(indices, inputs))


@KINDS
def test_every_parameter_gets_a_gradient_if_some_conditions_are_hidden(kind: str) -> None:
    prior = make_prior(kind, label_dropout=0.5, dropout=0.0).train()
    inputs = inputs_of(kind)[torch.arange(32) % 4]
    prior(random_indices(prior, 32), inputs).loss.backward()
    for name, parameter in prior.conditioner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@KINDS
def test_guidance_by_0_forgets_the_condition(kind: str) -> None:
    prior, inputs = make_prior(kind, FLAT), inputs_of(kind)
    drawn = [
        sample(prior, given, sample_generators(0, range(4)), guidance_scale=scale)[0]
        for given, scale in ((inputs, 0.0), (None, 1.0), (inputs, 1.0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_the_mask_hides_is_not_seen() -> None:
    prior, inputs = make_prior("tokens"), inputs_of("tokens")
    indices = random_indices(prior, 4)
    hidden = inputs.embeddings.masked_fill(~inputs.mask.unsqueeze(2), torch.nan)
    expected = prior.log_prob(indices, inputs)
    assert torch.equal(prior.log_prob(indices, Tokens(hidden, inputs.mask)), expected)


@pytest.mark.parametrize("kind", ["vectors", "tokens"])
def test_the_scale_of_an_encoder_does_not_matter(kind: str) -> None:
    prior, inputs = make_prior(kind), inputs_of(kind)
    assert isinstance(prior.conditioner, EmbeddingConditioner)
    values = inputs.embeddings if isinstance(inputs, Tokens) else inputs
    scale, shift = torch.tensor([1e-4, 1.0, 1e4]), torch.tensor([3.0, 0.0, -1e4])
    indices = random_indices(prior, 4)
    found = []
    for given in (values.double(), values.double() * scale + shift):
        prior.conditioner.standardize_by(given.reshape(-1, 3).float())
        rows = Tokens(given, inputs.mask) if isinstance(inputs, Tokens) else given
        found.append(prior.log_prob(indices, rows))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-2)
    prior.conditioner.standardize_by(torch.ones(5, 3))
    assert bool(prior.log_prob(indices, inputs).isfinite().all())


def test_attributes_that_are_all_open_are_the_null_condition() -> None:
    prior = make_prior("attributes")
    is_open = torch.full((2, 5), -1, dtype=torch.int8)
    torch.testing.assert_close(prior.condition(is_open, 2).vector, prior.null_condition(2).vector)


def test_the_share_of_hidden_attributes_is_label_dropout_alone_and_together() -> None:
    conditioner = make_prior("attributes", label_dropout=0.3).conditioner.train()
    with torch.no_grad():  # the vector tells which of the two attributes is open
        conditioner.embedding.zero_()
        conditioner.unknown.zero_()
        conditioner.unknown[0, 0] = conditioner.unknown[1, 1] = 2**0.5
    rows = inputs_of("attributes")[:1].expand(20_000, -1)
    vector = conditioner(rows).vector
    assert vector is not None
    is_open = vector[:, :2].round().bool()
    both, one = 0.3 + 0.7 * 0.3**2, 0.3 + 0.7 * 0.3
    assert is_open.all(1).double().mean().item() == pytest.approx(both, abs=0.02)
    assert is_open.double().mean(0).tolist() == pytest.approx([one, one], abs=0.02)


@KINDS
def test_the_codes_follow_the_condition_after_training(kind: str) -> None:
    """Images of one code, which the condition tells."""
    prior = make_prior(kind, SINGLE, dropout=0.0).train()
    inputs = inputs_of(kind)
    codes = torch.tensor([0, 1, 2, 3]).view(4, 1, 1, 1)
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    rows = torch.arange(16) % 4
    for _ in range(60):
        optimizer.zero_grad()
        prior([codes[rows]], inputs[rows]).loss.backward()
        optimizer.step()
    rows = torch.arange(40) % 4
    drawn = sample(prior.eval(), inputs[rows], sample_generators(0, range(40)), guidance_scale=2.0)[
        0
    ]
    assert (drawn == codes[rows]).double().mean() > 0.9


def changed(rows: Tensor, value: float) -> Tensor:
    rows = rows.clone()
    rows[0, 0] = value
    return rows


WRONG = {
    "condition must be given": ("vectors", lambda rows: None),
    "one row for 4 images, got 3": ("vectors", lambda rows: rows[:3]),
    r"shape \(4, 3\), got \(4, 2\)": ("vectors", lambda rows: rows[:, :2]),
    "must be floating-point, got torch.int64": ("vectors", lambda rows: rows.long()),
    "must be finite": ("vectors", lambda rows: changed(rows, torch.inf)),
    "as Tokens to this prior, got Tensor": ("tokens", lambda rows: rows.embeddings),
    r"shape \(4, 4, 3\), got \(4, 3, 3\)": (
        "tokens",
        lambda rows: Tokens(rows.embeddings[:, :3], rows.mask[:, :3]),
    ),
    "must be an int8 tensor": ("attributes", lambda rows: rows.long()),
    r"shape \(4, 5\), got \(4, 4\)": ("attributes", lambda rows: rows[:, 1:]),
    "must be 0 or 1": ("attributes", lambda rows: changed(rows, 2)),
    "or -1 at all values of an attribute": ("attributes", lambda rows: changed(rows, -1)),
}


@pytest.mark.parametrize("message", list(WRONG))
def test_another_number_width_type_or_value_is_refused(message: str) -> None:
    kind, change = WRONG[message]
    prior = make_prior(kind)
    with pytest.raises(InputError, match=message):
        prior.log_prob(random_indices(prior, 4), change(inputs_of(kind)))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("condition must be None with num_classes", {"num_classes": 3}),
        ("condition must be None with .*conditioner", {"has_custom_conditioner": True}),
        ("dim", {"condition": {"kind": "embeddings", "dim": 0}}),
        ("one of 'a' twice", {"condition": {"kind": "attributes", "attributes": [
            {"name": "a", "values": ["x", "x"]}
        ]}}),
        ("must differ in their names", {"condition": {"kind": "attributes", "attributes": [
            {"name": "a", "values": ["x"]}, {"name": "a", "values": ["y"]}
        ]}}),
        ("at most 524288 characters", {"condition": {"kind": "attributes", "attributes": [
            {"name": "a", "values": ["x" * 2**19]}
        ]}}),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(message: str, fields: dict[str, Any]) -> None:
    config = PriorConfig(code_maps=FLAT, condition=ATTRIBUTES).model_dump_json()
    assert PriorConfig.model_validate_json(config).condition == ATTRIBUTES
    with pytest.raises(ValidationError, match=message):
        PriorConfig.model_validate_json(json.dumps({**json.loads(config), **fields}))
