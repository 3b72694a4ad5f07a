"""The prior's network: likelihoods, causality, training, saved priors."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from prior import (
    Condition,
    IncrementalDecoder,
    Prior,
    PriorConfig,
    PriorNetworkConfig,
    layers,
    sample,
    sample_generators,
)
from tests.prior.small_priors import (
    CONDITIONS,
    FLAT,
    LAYOUTS,
    ORDERS,
    PYRAMID,
    SINGLE,
    VectorAndTokens,
    assert_close,
    cached_logits,
    decoder_of,
    every_logit,
    inputs_of,
    make_prior,
    random_indices,
    trained_prior,
)
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError


@CONDITIONS
@LAYOUTS
def test_a_code_never_changes_its_own_or_earlier_logits(
    order: str, positions: str, condition: str
) -> None:
    prior = make_prior(order=order, positions=positions, condition=condition)
    indices, inputs = random_indices(prior, 2), inputs_of(prior, [0, 2])
    before = every_logit(prior, indices, inputs)
    codes = prior.ordering.flatten(indices)
    places = prior.ordering.mask.nonzero().tolist()
    for number, (step, slot) in enumerate(places):
        changed = codes.clone()
        changed[:, step, slot] = (changed[:, step, slot] + 1) % 4
        after = every_logit(prior, prior.ordering.unflatten(changed), inputs)
        for earlier in range(number + 1):
            torch.testing.assert_close(after[earlier], before[earlier], rtol=0, atol=0)
        if number + 1 < len(places):
            assert not torch.equal(after[number + 1], before[number + 1])


@pytest.mark.parametrize("part", [0, 1])
@LAYOUTS
def test_every_step_sees_both_parts_of_a_condition(order: str, positions: str, part: int) -> None:
    prior = make_prior(order=order, positions=positions, condition="custom")
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    before = every_logit(prior, indices, labels)
    condition = list(prior.condition(labels, 2))
    condition[part] = condition[part] + 0.1
    prior.conditioner.forward = lambda inputs: Condition(*condition)  # type: ignore[method-assign]
    for logits, others in zip(before, every_logit(prior, indices, labels), strict=True):
        assert not torch.isclose(logits, others).all(1).any()


@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_of_all_code_combinations_sum_to_one(order: str) -> None:
    code_maps = (
        CodeMapConfig(height=2, width=1, codebook_sizes=(2, 3), code_dim=3),
        CodeMapConfig(height=2, width=2, codebook_sizes=(2,), code_dim=3),
    )
    prior = make_prior(code_maps, order, condition="none")
    ranges = [range(2)] * 2 + [range(3)] * 2 + [range(2)] * 4
    combinations = torch.tensor(list(itertools.product(*ranges)))
    coarse = combinations[:, :4].reshape(-1, 2, 2, 1)
    fine = combinations[:, 4:].reshape(-1, 1, 2, 2)
    log_probs = prior.log_prob([coarse, fine]).double()
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_probs.std() > 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_losses_are_cross_entropies_with_the_codes_or_soft_targets(order: str) -> None:
    prior = make_prior(order=order)
    indices, labels = random_indices(prior, 3), torch.tensor([0, 2, 1])
    logits = prior.logits(indices, labels)
    hard = [
        [
            nn.functional.one_hot(*pair)
            for pair in zip(codes.unbind(1), m.codebook_sizes, strict=True)
        ]
        for codes, m in zip(indices, prior.config.code_maps, strict=True)
    ]
    soft = [[torch.rand_like(layer).softmax(-1) for layer in group] for group in logits]
    for targets, given in ((hard, None), (soft, soft)):
        nats = [
            -(target * layer.log_softmax(-1)).sum((1, 2, 3))
            for pair in zip(targets, logits, strict=True)
            for target, layer in zip(*pair, strict=True)
        ]
        output = prior(indices, labels, given)
        torch.testing.assert_close(output.nats_per_layer, torch.stack(nats).mean(1))
        torch.testing.assert_close(output.loss, torch.stack(nats).sum(0).mean())
        if given is None:
            log_prob = -torch.stack(nats).sum(0)
            torch.testing.assert_close(prior.log_prob(indices, labels), log_prob)
            bits = prior.bits_per_image(indices, labels)
            torch.testing.assert_close(bits, -log_prob / math.log(2))


@pytest.mark.parametrize("code_maps", [PYRAMID, FLAT, SINGLE], ids=["pyramid", "flat", "single"])
@CONDITIONS
@LAYOUTS
def test_every_parameter_gets_a_gradient(
    code_maps: tuple[CodeMapConfig, ...], order: str, positions: str, condition: str
) -> None:
    prior = make_prior(code_maps, order, positions, condition).train()
    prior(random_indices(prior, 2), inputs_of(prior, [0, 2])).loss.backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Within a single slot there is nothing to attend to, a single step has no predecessor.
        if code_maps is PYRAMID:
            assert parameter.grad.abs().max() > 0, name


@LAYOUTS
def test_training_overfits_a_batch(order: str, positions: str) -> None:
    prior = make_prior(order=order, positions=positions, width=32, dropout=0.0).train()
    indices, labels = random_indices(prior, 4), torch.tensor([0, 1, 2, 2])
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior(indices, labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 4  # from 42


def test_label_dropout_hides_labels_in_training_only() -> None:
    prior = make_prior(dropout=0.0, label_dropout=0.5)
    indices = [group.expand(64, -1, -1, -1) for group in random_indices(prior, 1)]
    labels = torch.zeros(64, dtype=torch.int64)

    def first_logits() -> set[float]:
        return set(prior.logits(indices, labels)[0][0][:, 0, 0, 0].detach().tolist())

    assert len(first_logits()) == 1
    prior.train()
    assert len(first_logits()) == 2


def test_the_scale_and_mean_of_code_vectors_do_not_matter() -> None:
    prior = make_prior()
    vectors = [
        [torch.randn(size, m.code_dim) for size in m.codebook_sizes] for m in prior.config.code_maps
    ]
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    prior.load_code_vectors(vectors)
    first = prior.log_prob(indices, labels)
    prior.load_code_vectors([[100 * layer + 7 for layer in group] for group in vectors])
    torch.testing.assert_close(prior.log_prob(indices, labels), first, rtol=1e-4, atol=1e-4)
    prior.load_code_vectors([[layer.flip(0) for layer in group] for group in vectors])
    assert not torch.allclose(prior.log_prob(indices, labels), first, atol=1e-2)


def test_code_vectors_stay_under_their_projection_next_to_each_other() -> None:
    prior = make_prior()
    codes = prior.ordering.flatten(random_indices(prior, 1))
    embeddings = prior.embedding(prior.embedding.table(), codes)
    first_row = {(0, 0): 0, (0, 1): 5, (1, 0): 9}  # of each (group, layer)
    dims = {0: 3, 1: 4}
    positions = [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    for step, types in enumerate(prior.ordering.steps):
        for slot, (group, offset, layer) in enumerate(types):
            row = first_row[group, layer] + int(codes[0, step, slot])
            vector = prior.embedding.code_vectors[row, : dims[group]]
            projection = prior.embedding.projections[positions.index((group, offset))]
            torch.testing.assert_close(embeddings[0, step, slot], projection(vector))


@LAYOUTS
def test_logits_stay_in_float32_under_bfloat16_autocast(order: str, positions: str) -> None:
    prior = make_prior(order=order, positions=positions, condition="custom")
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    exact = prior(indices, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert prior.logits(indices, labels)[1][0].dtype == torch.float32
        loss = prior(indices, labels).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_rotary_positions_stand_beside_absolute_ones_and_earlier_priors_stay_as_they_are(
    order: str, tmp_path: Path
) -> None:
    earlier, later = (make_prior(order=order, positions=own) for own in ("rotary_only", "rotary"))
    for prior, number in ((earlier, 1 if order == "cell" else 2), (later, None)):
        num_steps = prior.ordering.num_steps
        contents = torch.ones(1, num_steps + 1, 16)  # so that nothing but positions differs
        inputs = prior.spatial_inputs(contents, None, 0, num_steps)[0].detach()
        assert len(inputs.unique(dim=0)) == (number or num_steps)
    earlier.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    save_file(earlier.state_dict(), tmp_path / "model.safetensors")  # without config.json's hash
    path.write_text(path.read_text().replace("rotary_only", "rotary").replace(": 3,", ": 2,", 1))
    loaded = Prior.from_pretrained(tmp_path)
    assert loaded.config == earlier.config
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    assert torch.equal(loaded.log_prob(indices, labels), earlier.log_prob(indices, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@LAYOUTS
def test_weights_of_16_bits_give_samples_and_likelihoods(
    order: str, positions: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    exact = trained_prior(order, positions)
    exact.save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path, dtype)
    assert prior.has_hash(exact.content_hash())
    if positions == "rotary":
        assert prior.rotary is not None
        assert torch.equal(prior.rotary, exact.rotary)  # not rounded
    indices, labels = random_indices(prior, 4), torch.tensor([0, 2, 1, 1])
    log_prob = prior.log_prob(indices, labels)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, exact.log_prob(indices, labels), rtol=0.05, atol=0.5)
    full = every_logit(prior, indices, labels)
    assert_close(
        [own.float() for own in cached_logits(decoder_of(prior, labels, 4), indices)], full, 0.3
    )
    prior.ordering.check(sample(prior, labels, sample_generators(0, range(4))))
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert {own.dtype for own in again.parameters()} == {dtype}
    assert torch.equal(again.log_prob(indices, labels), log_prob)


@pytest.mark.parametrize("adaptive_norm", [False, True])
def test_the_depth_transformer_gives_the_same_in_parts(
    adaptive_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = trained_prior("cell", "learned", adaptive_norm=adaptive_norm)
    indices, labels = random_indices(prior, 3), torch.tensor([0, 2, 1])
    whole = prior.log_prob(indices, labels)
    monkeypatch.setattr(layers, "MAX_SEQUENCES", 5)
    torch.testing.assert_close(prior.log_prob(indices, labels), whole)


def test_weight_decay_spares_embeddings_and_gains_only() -> None:
    prior = make_prior(order="coarse_to_fine")
    spared = prior.no_weight_decay()
    names = {name for name, _ in prior.named_parameters()}
    assert {"start", "position_embedding", "slot_embedding", "conditioner.embedding"} <= spared
    assert spared < names
    assert all(name.endswith((".weight", ".bias")) for name in names - spared)


def test_wrong_network_settings_are_rejected() -> None:
    for fields, message in (
        ({"width": 30, "num_heads": 4}, "width must be a multiple of num_heads = 4, got 30"),
        ({"width": 12, "num_heads": 2, "positions": "rotary"}, "multiple of 4 for rotary"),
    ):
        with pytest.raises(ValidationError, match=message):
            PriorNetworkConfig.model_validate(fields)


def test_a_conditioner_that_the_config_does_not_name_is_refused_and_the_other_way(
    tmp_path: Path,
) -> None:
    make_prior(condition="custom").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="conditioner must be given to this prior"):
        Prior.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"conditioner must be None .*, got VectorAndTokens"):
        Prior(make_prior().config, VectorAndTokens(16))
    with pytest.raises(ValidationError, match="num_classes must be 0 with has_custom_conditioner"):
        PriorConfig(code_maps=PYRAMID, num_classes=1, has_custom_conditioner=True)


def test_a_conditioner_of_other_shapes_is_refused() -> None:
    prior = make_prior(condition="custom")
    prior.conditioner.parts = nn.Linear(16, 3 * 15)
    with pytest.raises(InputError, match=r"vector must have shape \(2, 16\), got \(2, 15\)"):
        prior.log_prob(random_indices(prior, 2), torch.tensor([0, 1]))
    prior = make_prior(condition="custom")
    prior.conditioner.num_tokens = 3
    with pytest.raises(InputError, match=r"tokens must have shape \(2, 3, 16\), got \(2, 2, 16\)"):
        prior.null_condition(2)
    decoder = IncrementalDecoder(make_prior(), Condition(torch.zeros(2, 16)), 2)
    with pytest.raises(InputError, match="vector must be given always or never"):
        decoder.restart(Condition())


@pytest.mark.parametrize(
    ("condition", "inputs", "message"),
    [
        ("class", None, "labels must be given"),
        ("class", torch.tensor([0, 3]), r"labels must lie in \[0, 3\), got 3"),
        ("class", torch.tensor([-1, 0]), r"labels must lie in \[0, 3\), got -1"),
        ("class", torch.tensor([0, 1], dtype=torch.int32), "labels must be int64"),
        ("class", torch.tensor([0, 1, 2]), r"labels must have shape \(2,\), got \(3,\)"),
        ("none", torch.tensor([0, 1]), "labels must be None"),
        ("custom", None, "condition must be given"),
        ("custom", torch.tensor([0]), "condition must have one row for 2 images, got 1"),
    ],
)
def test_wrong_inputs_of_a_conditioner_are_rejected(
    condition: str, inputs: Tensor | None, message: str
) -> None:
    prior = make_prior(condition=condition)
    with pytest.raises(InputError, match=message):
        prior.log_prob(random_indices(prior, 2), inputs)


def test_log_prob_rejects_wrong_indices_and_training_mode() -> None:
    prior = make_prior(condition="none")
    indices = random_indices(prior, 2)
    indices[1][0, 0, 0, 0] = 6
    with pytest.raises(InputError, match=r"indices\[1\]\[:, 0\] must lie in \[0, 6\), got 6"):
        prior.log_prob(indices)
    with pytest.raises(InputError, match="evaluation mode"):
        prior.train().log_prob(random_indices(prior, 2))


def test_wrong_code_vectors_are_rejected() -> None:
    prior = make_prior()
    good = [[torch.randn(5, 3), torch.randn(4, 3)], [torch.randn(6, 4)]]
    for wrong, message in [
        (good[:1], "code_vectors must hold 2 groups, got 1"),
        ([good[0], [torch.randn(6, 3)]], r"code_vectors\[1\] must have the shapes"),
        ([good[0], [torch.full((6, 4), math.nan)]], r"code_vectors\[1\] must be finite"),
    ]:
        with pytest.raises(InputError, match=message):
            prior.load_code_vectors(wrong)
