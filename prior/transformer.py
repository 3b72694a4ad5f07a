"""The prior: a body over the steps of a code ordering, a head over the codes within a step."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.config import PriorConfig
from prior.embedding import CodeEmbedding
from prior.layers import predecessor_matrix, rotary_angles, transformer
from prior.ordering import CodeOrdering
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule

EMBEDDING_STD = 0.5
# CUDA's attention kernels fail beyond this many sequences (pytorch/pytorch issue 142228).
MAX_SEQUENCES = 65_535


class PriorOutput(NamedTuple):
    """The training objective."""

    loss: Float[Tensor, ""]
    """Nats per image, batch mean."""
    nats_per_layer: Float[Tensor, " layers"]
    """Its terms, over all groups, coarse to fine."""


class Prior(PretrainedModule[PriorConfig]):
    """Autoregressive distribution over the code indices of an image.

    The body sees, at each step, the summed embeddings of the codes of the step before; in the
    coarse_to_fine order also those of the enclosing position in the next coarser map. The head
    starts from the body's output and sees the codes of its own step so far, residual stacks as
    partial sums (RQ-Transformer, arXiv 2203.01941).

    A new prior holds random code vectors: call `load_code_vectors` before training.

    Raises:
        InputError: the order does not suit the code maps.
    """

    config_class = PriorConfig
    _position: Tensor
    _predecessors: Tensor
    rotary: Tensor | None
    """(1, num_steps, head_dim): angles of the body's steps; None if positions are learned."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        network, width = config.network, config.network.width
        self.ordering = CodeOrdering(config.code_maps, network.order)
        self.embedding = CodeEmbedding(self.ordering, width)
        groups = self.ordering.group[:, 0]
        is_learned = network.positions == "learned"
        positions = torch.arange(self.ordering.num_steps) if is_learned else groups
        num_positions = self.ordering.num_steps if is_learned else len(config.code_maps)
        self.start = _embedding(1, width)
        self.position_embedding = _embedding(num_positions, width)
        self.slot_embedding = _embedding(len(self.ordering.slot_types), width)
        self.class_embedding = (
            _embedding(config.num_classes + 1, width) if config.num_classes else None
        )
        has_parents = network.order == "coarse_to_fine" and len(config.code_maps) > 1
        self.parent_projection = nn.Linear(width, width, bias=False) if has_parents else None
        self.body = transformer(network, network.body_depth)
        self.head = transformer(network, network.head_depth)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in config.codebook_sizes)
        for output in self.outputs:  # small: training starts near log K nats per code
            assert isinstance(output, nn.Linear)
            nn.init.normal_(output.weight, std=0.25 * width**-0.5)
            nn.init.zeros_(output.bias)
        rotary = None if is_learned else rotary_angles(self.ordering, width // network.num_heads)
        self.register_buffer("rotary", rotary, persistent=False)
        self.register_buffer("_position", positions, persistent=False)
        longest_step = max(self.ordering.steps, key=len)
        # Codes of one position add up to about unit variance already.
        self._content_scale = 1 / math.sqrt(len({slot[:2] for slot in longest_step}))
        predecessors = predecessor_matrix(longest_step)
        self.register_buffer("_predecessors", predecessors, persistent=False)

    def no_weight_decay(self) -> set[str]:
        """Names of embeddings and gains, which weight decay should spare (timm's convention)."""
        embeddings = {name for name, _ in self.named_parameters(recurse=False)}
        return embeddings | {
            name for name, _ in self.named_parameters() if name.endswith((".g", ".gamma"))
        }

    def load_code_vectors(self, code_vectors: Sequence[Sequence[Tensor]]) -> None:
        """Takes over the tokenizer's code vectors, (K, code_dim) per group and layer.

        They are stored centered and scaled, so that the tokenizer's scale does not matter.

        Raises:
            InputError: number or shapes do not fit the code maps, or a value is not finite.
        """
        self.embedding.load(code_vectors)

    def forward(
        self,
        indices: Sequence[Int[Tensor, "batch _depth _height _width"]],
        labels: Int[Tensor, " batch"] | None = None,
        soft_targets: Sequence[Sequence[Float[Tensor, "batch _height _width _codes"]]]
        | None = None,
    ) -> PriorOutput:
        """Cross entropy of every code given the earlier ones of `indices`.

        Args:
            indices: The codes; their values are not checked here.
            labels: Classes; in training mode a share `label_dropout` of them is hidden.
            soft_targets: Targets instead of `indices`: probabilities per group and layer, such as
                the tokenizer's posterior.

        Raises:
            InputError: labels are missing, or given to an unconditional prior.
        """
        nats = self._nats(indices, labels, soft_targets).mean(0)
        return PriorOutput(nats.sum(), nats)

    def log_prob(
        self, indices: Sequence[Tensor], labels: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Exact log P(indices | labels) of each image, in nats.

        Args:
            indices: Codes (B, depth, h, w) per group, int64.
            labels: Classes (B,), int64; None for an unconditional prior.

        Raises:
            InputError: indices or labels do not fit, or the prior is in training mode.
        """
        self.check_evaluation()
        self.ordering.check(indices)
        self.check_labels(labels, len(indices[0]))
        return -self._nats(indices, labels, None).sum(1)

    def bits_per_image(
        self, indices: Sequence[Tensor], labels: Tensor | None = None
    ) -> Float[Tensor, " batch"]:
        """Code length of each image, -log2 P(indices | labels); arguments as for `log_prob`."""
        return self.log_prob(indices, labels) / -math.log(2)

    def logits(
        self,
        indices: Sequence[Int[Tensor, "batch _depth _height _width"]],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> list[list[Float[Tensor, "batch _height _width _codes"]]]:
        """Logits of every code given all earlier ones, per group and layer, never autocast.

        Raises:
            InputError: labels are missing, or given to an unconditional prior.
        """
        codes = self.ordering.flatten(indices)
        batch, num_steps, num_slots = codes.shape
        condition = self.condition(labels)
        embeddings = self.embedding(self.embedding.table(), codes)  # (B, S, M, W)
        start = self.start.expand(batch, 1, -1)
        contents = torch.cat([start, self.summarize(embeddings)], dim=1)
        hidden = self.body(
            self.body_inputs(contents, condition, 0, num_steps), **self.rotary_arguments(num_steps)
        )
        values = torch.cat([hidden.unsqueeze(2), embeddings], dim=2)
        inputs = self.head_inputs(values, 0, num_steps, 0, num_slots).flatten(0, 1)
        hidden = torch.cat([self.head(part) for part in torch.split(inputs, MAX_SEQUENCES)])
        hidden = hidden.view(batch, num_steps * num_slots, -1)
        return [
            [
                self.project(hidden[:, self.ordering.slots(group, layer)], group, layer)
                for layer in range(code_map.depth)
            ]
            for group, code_map in enumerate(self.config.code_maps)
        ]

    def check_evaluation(self) -> None:
        """Raises InputError in training mode, where dropout would make results random."""
        if self.training:
            raise InputError("prior must be in evaluation mode, got training mode: call eval()")

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """Waits for the device and checks labels.

        Raises:
            InputError: labels are missing, given to an unconditional prior, of another number
                than `batch`, not int64 or out of range.
        """
        num_classes = self.config.num_classes
        if labels is None or not num_classes:
            self.condition(labels)
            return
        if tuple(labels.shape) != (batch,):
            raise InputError(f"labels must have shape ({batch},), got {tuple(labels.shape)}")
        if labels.dtype != torch.int64:
            raise InputError(f"labels must be int64, got {labels.dtype}")
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise InputError(f"labels must lie in [0, {num_classes}), got {int(wrong[0])}")

    def condition(
        self, labels: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch 1 width"] | None:
        """Embedding of the labels, None if unconditional; label `num_classes` is the null class.

        Raises:
            InputError: labels are missing, or given to an unconditional prior.
        """
        if self.class_embedding is None:
            if labels is not None:
                raise InputError("labels must be None for an unconditional prior, got labels")
            return None
        if labels is None:
            raise InputError("labels must be given for a class-conditional prior, got None")
        if self.training:
            is_hidden = torch.rand(labels.shape, device=labels.device)
            is_hidden = is_hidden < self.config.network.label_dropout
            labels = labels.masked_fill(is_hidden, self.config.num_classes)
        return nn.functional.embedding(labels, self.class_embedding).unsqueeze(1)

    def _nats(
        self,
        indices: Sequence[Tensor],
        labels: Tensor | None,
        soft_targets: Sequence[Sequence[Tensor]] | None,
    ) -> Tensor:
        """Cross entropy summed over positions, (B, layers)."""
        nats = []
        for group, layers in enumerate(self.logits(indices, labels)):
            for layer, logits in enumerate(layers):
                targets = (
                    indices[group][:, layer].flatten()
                    if soft_targets is None
                    else soft_targets[group][layer].float().flatten(0, 2)
                )
                entropies = nn.functional.cross_entropy(
                    logits.flatten(0, 2), targets, reduction="none"
                )
                nats.append(entropies.view(len(logits), -1).sum(1))
        return torch.stack(nats, dim=1)

    def summarize(
        self, embeddings: Float[Tensor, "*batch slots width"]
    ) -> Float[Tensor, "*batch width"]:
        """What the body sees of a step, given the embeddings of its codes."""
        return self._content_scale * embeddings.sum(-2)

    def body_inputs(
        self,
        contents: Float[Tensor, "batch contents width"],
        condition: Float[Tensor, "batch 1 width"] | None,
        first: int,
        last: int,
        parent_projection: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch steps width"]:
        """The body's inputs at the steps first..last - 1.

        `contents` holds the start vector, then the summaries of the steps before `last`;
        `parent_projection` stands in for the module.
        """
        parent_projection = parent_projection or self.parent_projection
        inputs = contents[:, first:last] + self.position_embedding[self._position[first:last]]
        if parent_projection is not None:
            # Without a parent, -1 + 1 points at the start vector.
            parents = contents[:, self.ordering.parent_step[first:last] + 1]
            inputs = inputs + parent_projection(parents)
        return inputs if condition is None else inputs + condition

    def head_inputs(
        self,
        values: Float[Tensor, "batch steps values width"],
        first_step: int,
        last_step: int,
        first: int,
        last: int,
    ) -> Float[Tensor, "batch steps slots width"]:
        """The head's inputs at the slots first..last - 1 of some steps.

        `values` holds, per step, the body's output and the embeddings of its codes.
        """
        sums = torch.einsum("mn,bsnw->bsmw", self._predecessors[first:last], values)
        types = self.ordering.slot_type[first_step:last_step, first:last]
        return sums + self.slot_embedding[types]

    def rotary_arguments(self, length: int) -> dict[str, Any]:
        """Arguments of the body for positions up to `length`; none if they are learned."""
        return {} if self.rotary is None else {"rotary_pos_emb": (self.rotary[:, :length], 1.0)}

    def project(
        self, hidden: Float[Tensor, "*shape width"], group: int, layer: int
    ) -> Float[Tensor, "*shape codes"]:
        """Logits over one layer's codes, in the weights' precision whatever the autocast."""
        number = sum(m.depth for m in self.config.code_maps[:group]) + layer
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.outputs[number](hidden.to(self.start.dtype))
        return logits


def _embedding(number: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(number, width) * EMBEDDING_STD)
