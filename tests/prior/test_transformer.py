"""The prior's network: likelihoods, causality, caching, training."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from prior import Prior, PriorConfig, PriorNetworkConfig
from prior import transformer as transformer_module
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError

torch.set_num_threads(1)

PYRAMID = (
    CodeMapConfig(height=2, width=2, codebook_sizes=(5, 4), code_dim=3),
    CodeMapConfig(height=4, width=4, codebook_sizes=(6,), code_dim=4),
)
FLAT = (CodeMapConfig(height=2, width=3, codebook_sizes=(5,), code_dim=3),)
SINGLE = (CodeMapConfig(height=1, width=1, codebook_sizes=(5,), code_dim=3),)
ORDERS = ("coarse_to_fine", "cell")
POSITIONS = ("learned", "rotary")
LAYOUTS = pytest.mark.parametrize(
    ("order", "positions"),
    [pytest.param(*pair, id="-".join(pair)) for pair in itertools.product(ORDERS, POSITIONS)],
)


def make_prior(
    code_maps: tuple[CodeMapConfig, ...] = PYRAMID,
    order: str = "cell",
    positions: str = "learned",
    num_classes: int = 3,
    **network: float,
) -> Prior:
    """A small prior whose outputs are far from uniform."""
    torch.manual_seed(0)
    fields = {"width": 16, "body_depth": 2, "head_depth": 1, "num_heads": 2, **network}
    fields |= {"order": order, "positions": positions}
    config = PriorConfig(
        network=PriorNetworkConfig.model_validate(fields),
        code_maps=code_maps,
        num_classes=num_classes,
    )
    prior = Prior(config).eval()
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.mul_(6)
    return prior


def random_indices(prior: Prior, batch: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.stack(
            [
                torch.randint(size, (batch, m.height, m.width), generator=generator)
                for size in m.codebook_sizes
            ],
            dim=1,
        )
        for m in prior.config.code_maps
    ]


def every_logit(prior: Prior, indices: list[Tensor], labels: Tensor | None) -> list[Tensor]:
    """Logits (B, K) by (step, slot) in the order of generation."""
    by_layer = prior.logits(indices, labels)
    ordering = prior.ordering
    return [
        by_layer[group][layer][:, ordering.row[step, slot], ordering.column[step, slot]]
        for step, types in enumerate(ordering.steps)
        for slot, (group, _, layer) in enumerate(types)
    ]


@LAYOUTS
def test_a_code_never_changes_its_own_or_earlier_logits(order: str, positions: str) -> None:
    prior = make_prior(order=order, positions=positions)
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    before = every_logit(prior, indices, labels)
    codes = prior.ordering.flatten(indices)
    places = prior.ordering.mask.nonzero().tolist()
    for number, (step, slot) in enumerate(places):
        changed = codes.clone()
        changed[:, step, slot] = (changed[:, step, slot] + 1) % 4
        after = every_logit(prior, prior.ordering.unflatten(changed), labels)
        for earlier in range(number + 1):
            torch.testing.assert_close(after[earlier], before[earlier], rtol=0, atol=0)
        if number + 1 < len(places):
            assert not torch.equal(after[number + 1], before[number + 1])


@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_of_all_code_combinations_sum_to_one(order: str) -> None:
    code_maps = (
        CodeMapConfig(height=2, width=1, codebook_sizes=(2, 3), code_dim=3),
        CodeMapConfig(height=2, width=2, codebook_sizes=(2,), code_dim=3),
    )
    prior = make_prior(code_maps, order, num_classes=0)
    ranges = [range(2)] * 2 + [range(3)] * 2 + [range(2)] * 4
    combinations = torch.tensor(list(itertools.product(*ranges)))
    coarse = combinations[:, :4].reshape(-1, 2, 2, 1)
    fine = combinations[:, 4:].reshape(-1, 1, 2, 2)
    log_probs = prior.log_prob([coarse, fine]).double()
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_probs.std() > 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_log_prob_sums_the_log_softmax_of_the_codes(order: str) -> None:
    prior = make_prior(order=order)
    indices, labels = random_indices(prior, 3), torch.tensor([0, 2, 1])
    expected = torch.zeros(3, dtype=torch.float64)
    codes = prior.ordering.flatten(indices)
    places = prior.ordering.mask.nonzero().tolist()
    for (step, slot), logits in zip(places, every_logit(prior, indices, labels), strict=True):
        log_probs = logits.double().log_softmax(-1)
        expected += log_probs[torch.arange(3), codes[:, step, slot]]
    log_prob = prior.log_prob(indices, labels)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=1e-5)
    output = prior(indices, labels)
    torch.testing.assert_close(output.loss, -log_prob.mean())
    torch.testing.assert_close(output.nats_per_layer.sum(), output.loss)
    assert output.nats_per_layer.shape == (3,)
    torch.testing.assert_close(prior.bits_per_image(indices, labels), -log_prob / math.log(2))


def test_a_new_prior_starts_near_uniform() -> None:
    prior = make_prior()
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.div_(6)
    uniform = 4 * math.log(5) + 4 * math.log(4) + 16 * math.log(6)
    loss = prior(random_indices(prior, 8), torch.zeros(8, dtype=torch.int64)).loss
    assert loss.item() == pytest.approx(uniform, rel=0.05)


def test_images_of_a_batch_are_independent() -> None:
    prior = make_prior()
    indices, labels = random_indices(prior, 4), torch.tensor([0, 2, 1, 0])
    together = prior.log_prob(indices, labels)
    for image in range(4):
        alone = prior.log_prob(
            [group[image : image + 1] for group in indices], labels[image : image + 1]
        )
        torch.testing.assert_close(alone, together[image : image + 1])


def test_labels_change_the_distribution() -> None:
    prior = make_prior()
    indices = [group.expand(3, -1, -1, -1) for group in random_indices(prior, 1)]
    assert len(set(prior.log_prob(indices, torch.arange(3)).tolist())) == 3


def test_one_hot_soft_targets_equal_hard_targets() -> None:
    prior = make_prior()
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    soft_targets = [
        [
            torch.nn.functional.one_hot(group[:, layer], size).float()
            for layer, size in enumerate(m.codebook_sizes)
        ]
        for group, m in zip(indices, prior.config.code_maps, strict=True)
    ]
    hard, soft = prior(indices, labels), prior(indices, labels, soft_targets)
    torch.testing.assert_close(soft.nats_per_layer, hard.nats_per_layer)


def test_soft_targets_weigh_the_log_probabilities() -> None:
    prior = make_prior(FLAT, num_classes=0)
    indices = random_indices(prior, 2)
    targets = torch.rand(2, 2, 3, 5).softmax(-1)
    expected = -(targets * prior.logits(indices)[0][0].log_softmax(-1)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(prior(indices, None, [[targets]]).loss, expected)


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("code_maps", [PYRAMID, FLAT, SINGLE], ids=["pyramid", "flat", "single"])
@LAYOUTS
def test_every_parameter_gets_a_gradient(
    code_maps: tuple[CodeMapConfig, ...], order: str, positions: str, num_classes: int
) -> None:
    prior = make_prior(code_maps, order, positions, num_classes).train()
    labels = torch.tensor([0, 2]) if num_classes else None
    prior(random_indices(prior, 2), labels).loss.backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A head over a single slot has nothing to attend to, a single step no predecessor.
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
    prior = make_prior(num_classes=2, dropout=0.0, label_dropout=0.5)
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


def test_checkpoints_restore_the_prior_with_its_code_vectors(tmp_path: Path) -> None:
    prior = make_prior(positions="rotary", order="coarse_to_fine")
    prior.load_code_vectors(
        [[torch.randn(5, 3), torch.randn(4, 3)], [torch.randn(6, 4)]],
    )
    prior.save_pretrained(tmp_path)
    restored = Prior.from_pretrained(tmp_path)
    assert restored.config == prior.config
    assert restored.content_hash() == prior.content_hash()
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    torch.testing.assert_close(
        restored.log_prob(indices, labels), prior.log_prob(indices, labels), rtol=0, atol=0
    )


@LAYOUTS
def test_logits_stay_in_float32_under_bfloat16_autocast(order: str, positions: str) -> None:
    prior = make_prior(order=order, positions=positions)
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    exact = prior(indices, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert prior.logits(indices, labels)[1][0].dtype == torch.float32
        loss = prior(indices, labels).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


def test_the_head_gives_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_prior()
    indices, labels = random_indices(prior, 3), torch.tensor([0, 2, 1])
    whole = prior.log_prob(indices, labels)
    monkeypatch.setattr(transformer_module, "MAX_SEQUENCES", 5)
    torch.testing.assert_close(prior.log_prob(indices, labels), whole)


def test_weight_decay_spares_embeddings_and_gains_only() -> None:
    prior = make_prior(order="coarse_to_fine")
    spared = prior.no_weight_decay()
    assert {"start", "position_embedding", "slot_embedding", "class_embedding"} <= spared
    names = {name for name, _ in prior.named_parameters()}
    assert spared < names
    assert all(name.endswith((".weight", ".bias")) for name in names - spared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width must be a multiple of num_heads = 4, got 30"),
        ({"width": 12, "num_heads": 2, "positions": "rotary"}, "multiple of 4 for rotary"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"order": "raster"}, "order"),
    ],
)
def test_wrong_network_settings_are_rejected(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PriorNetworkConfig.model_validate(fields)


def test_wrong_labels_are_rejected() -> None:
    prior = make_prior()
    indices = random_indices(prior, 2)
    for labels, message in [
        (None, "labels must be given"),
        (torch.tensor([0, 3]), r"labels must lie in \[0, 3\), got 3"),
        (torch.tensor([-1, 0]), r"labels must lie in \[0, 3\), got -1"),
        (torch.tensor([0, 1], dtype=torch.int32), "labels must be int64"),
    ]:
        with pytest.raises(InputError, match=message):
            prior.log_prob(indices, labels)
    with pytest.raises(InputError, match=r"labels must have shape \(2,\), got \(3,\)"):
        prior.check_labels(torch.tensor([0, 1, 2]), 2)
    with pytest.raises(InputError, match="labels must be given"):
        prior(indices)
    unconditional = make_prior(num_classes=0)
    with pytest.raises(InputError, match="labels must be None"):
        unconditional(indices, torch.tensor([0, 1]))


def test_log_prob_rejects_wrong_indices_and_training_mode() -> None:
    prior = make_prior(num_classes=0)
    indices = random_indices(prior, 2)
    indices[1][0, 0, 0, 0] = 6
    with pytest.raises(InputError, match=r"indices\[1\], layer 0, must lie in \[0, 6\), got 6"):
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
