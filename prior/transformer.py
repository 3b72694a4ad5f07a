"""The prior: a spatial transformer over the steps of a code ordering, a depth one within a step."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.conditioner import Condition, Conditioner, check_condition
from prior.conditioners import make_conditioner
from prior.config import PriorConfig, upgrade_names, upgrade_network
from prior.embedding import CodeEmbedding
from prior.layers import apply, predecessor_matrix, random_embedding, rotary_angles, transformer
from prior.ordering import CodeOrdering
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule, WeightT


class PriorOutput(NamedTuple):
    """The training objective."""

    loss: Float[Tensor, ""]
    """Nats per image, batch mean."""
    nats_per_layer: Float[Tensor, " layers"]
    """Its terms, over all groups, coarse to fine."""


class Prior(PretrainedModule[PriorConfig]):
    """Autoregressive distribution over the code indices of an image.

    The spatial transformer sees, at each step, the summed embeddings of the codes of the step
    before; in the coarse_to_fine order also those of the enclosing position in the next coarser
    map. The depth transformer starts from its output and sees the earlier codes of the same step,
    residual stacks as partial sums (RQ-Transformer, arXiv 2203.01941). What the conditioner gives
    is added to the steps, or stands before them.

    A new prior holds random code vectors: call `load_code_vectors` before training.

    Args:
        config: Sizes and code maps.
        conditioner: A user's, if `config.has_custom_conditioner`.

    Raises:
        InputError: the order does not suit the code maps, or the conditioner not the config.
    """

    config_class = PriorConfig
    _position: Tensor
    _predecessors: Tensor
    _angle_bits: Tensor | None

    def __init__(self, config: PriorConfig, conditioner: Conditioner | None = None) -> None:
        super().__init__(config)
        network, width = config.network, config.network.width
        self.ordering = CodeOrdering(config.code_maps, network.order)
        embedding = CodeEmbedding(self.ordering, width)
        has_steps, has_angles = network.positions != "rotary_only", network.positions != "learned"
        num_positions = self.ordering.num_steps if has_steps else len(config.code_maps)
        positions = torch.arange(num_positions) if has_steps else self.ordering.group[:, 0]
        self.start = random_embedding(1, width)
        self.position_embedding = random_embedding(num_positions, width)
        self.slot_embedding = random_embedding(len(self.ordering.slot_types), width)
        # Random numbers and the order of parameters, by which optimizers save, are format 1's.
        self.conditioner = make_conditioner(config, conditioner)
        self.embedding = embedding
        has_parents = network.order == "coarse_to_fine" and len(config.code_maps) > 1
        self.parent_projection = nn.Linear(width, width, bias=False) if has_parents else None
        self.spatial_transformer = transformer(network, network.num_spatial_layers)
        self.depth_transformer = transformer(network, network.num_depth_layers)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in config.codebook_sizes)
        for output in self.outputs:  # small: training starts near log K nats per code
            assert isinstance(output, nn.Linear)
            nn.init.normal_(output.weight, std=0.25 * width**-0.5)
            nn.init.zeros_(output.bias)
        angles_of = (self.ordering, width // network.num_heads, self.conditioner.num_tokens)
        # As integers, which `bfloat16()` and `to(dtype)` leave alone: it would round the angles.
        bits = rotary_angles(*angles_of).view(torch.int32) if has_angles else None
        self.register_buffer("_angle_bits", bits, persistent=False)
        self.register_buffer("_position", positions, persistent=False)
        longest_step = max(self.ordering.steps, key=len)
        # Codes of one position add up to about unit variance already.
        self._content_scale = 1 / math.sqrt(len({slot[:2] for slot in longest_step}))
        self.register_buffer("_predecessors", predecessor_matrix(longest_step), persistent=False)

    @property
    def rotary(self) -> Float[Tensor, "1 inputs head_dim"] | None:
        """Angles in float32, or float64 if the weights are; None if positions are learned."""
        if self._angle_bits is None:
            return None
        angles = self._angle_bits.view(torch.float32)
        return angles.double() if self.start.dtype == torch.float64 else angles

    def no_weight_decay(self) -> set[str]:
        """Names of embeddings and gains, which weight decay should spare (timm's convention)."""
        names = [name for name, _ in self.named_parameters()]
        direct = {name for name in names if "." not in name.removeprefix("conditioner.")}
        return direct | {name for name in names if name.endswith((".g", ".gamma"))}

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields of config.json in an earlier format, as they are called today."""
        if not isinstance(fields.get("network"), dict):
            return fields
        return fields | {"network": upgrade_network(fields["network"], version)}

    @classmethod
    def upgrade_weights(cls, weights: dict[str, WeightT], version: int) -> dict[str, WeightT]:
        """Weights of an earlier format under today's names."""
        return upgrade_names(weights) if version == 1 else weights

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
        inputs: Any = None,
        soft_targets: Sequence[Sequence[Float[Tensor, "batch _height _width _codes"]]]
        | None = None,
    ) -> PriorOutput:
        """Cross entropy of every code given the earlier ones of `indices`.

        Args:
            indices: The codes; their values are not checked here.
            inputs: What the conditioner takes: classes (B,), int64, of which a share
                `label_dropout` is hidden in training mode; None for an unconditional prior.
            soft_targets: Targets instead of `indices`: probabilities per group and layer, such as
                the tokenizer's posterior.

        Raises:
            InputError: the inputs are missing, or given to an unconditional prior.
        """
        nats = self._nats(indices, inputs, soft_targets).mean(0)
        return PriorOutput(nats.sum(), nats)

    def log_prob(self, indices: Sequence[Tensor], inputs: Any = None) -> Float[Tensor, " batch"]:
        """Exact log P(indices | condition) of each image, in nats.

        Args:
            indices: Codes (B, depth, h, w) per group, int64.
            inputs: As for `forward`.

        Raises:
            InputError: indices or inputs do not fit, or the prior is in training mode.
        """
        self.check_evaluation()
        self.ordering.check(indices)
        self.conditioner.check(inputs, len(indices[0]))
        return -self._nats(indices, inputs, None).sum(1)

    def bits_per_image(
        self, indices: Sequence[Tensor], inputs: Any = None
    ) -> Float[Tensor, " batch"]:
        """Code length of each image, -log2 P(indices | condition); arguments as for `log_prob`."""
        return self.log_prob(indices, inputs) / -math.log(2)

    def logits(
        self,
        indices: Sequence[Int[Tensor, "batch _depth _height _width"]],
        inputs: Any = None,
    ) -> list[list[Float[Tensor, "batch _height _width _codes"]]]:
        """Logits of every code given all earlier ones, per group and layer, never autocast.

        In float32 at least, as are likelihoods.

        Raises:
            InputError: the inputs are missing, or given to an unconditional prior.
        """
        codes = self.ordering.flatten(indices)
        batch, num_steps, num_slots = codes.shape
        condition = self.condition(inputs, batch)
        embeddings = self.embedding(self.embedding.table(), codes)  # (B, S, M, W)
        contents = torch.cat([self.start.expand(batch, 1, -1), self.summarize(embeddings)], dim=1)
        sequence = self.spatial_inputs(contents, condition.vector, 0, num_steps)
        if condition.tokens is not None:
            sequence = torch.cat([condition.tokens, sequence], dim=1)
        rotary = {} if self.rotary is None else {"rotary_pos_emb": (self.rotary, 1.0)}
        hidden = apply(self.spatial_transformer, sequence, condition.vector, **rotary)
        hidden = hidden[:, self.conditioner.num_tokens :]
        values = torch.cat([hidden.unsqueeze(2), embeddings], dim=2)
        sequences = self.depth_inputs(values, 0, num_steps, 0, num_slots).flatten(0, 1)
        hidden = apply(self.depth_transformer, sequences, condition.vector)
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

    def condition(self, inputs: Any, batch: int) -> Condition:
        """What the conditioner makes of the inputs of `batch` images; a `Condition` is one already.

        Raises:
            InputError: the inputs are missing, or the conditioner gives another shape.
        """
        condition: Condition = inputs if isinstance(inputs, Condition) else self.conditioner(inputs)
        check_condition(condition, self.conditioner, batch, self.config.network.width)
        return condition

    def null_condition(self, batch: int) -> Condition:
        """What stands for no condition, if the conditioner has it.

        Raises:
            InputError: the conditioner gives another shape.
        """
        condition = self.conditioner.null(batch)
        check_condition(condition, self.conditioner, batch, self.config.network.width)
        return condition

    def _nats(
        self,
        indices: Sequence[Tensor],
        inputs: Any,
        soft_targets: Sequence[Sequence[Tensor]] | None,
    ) -> Tensor:
        """Cross entropy summed over positions, (B, layers)."""
        nats = []
        for group, layers in enumerate(self.logits(indices, inputs)):
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
        """What the spatial transformer sees of a step, given the embeddings of its codes."""
        return self._content_scale * embeddings.sum(-2)

    def spatial_inputs(
        self,
        contents: Float[Tensor, "batch contents width"],
        vector: Float[Tensor, "batch width"] | None,
        first: int,
        last: int,
        parent_projection: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch steps width"]:
        """The spatial transformer's inputs at the steps first..last - 1.

        `contents` holds the start vector, then the summaries of the steps before `last`;
        `parent_projection` stands in for the module.
        """
        parent_projection = parent_projection or self.parent_projection
        inputs = contents[:, first:last] + self.position_embedding[self._position[first:last]]
        if parent_projection is not None:
            # Without a parent, -1 + 1 points at the start vector.
            parents = contents[:, self.ordering.parent_step[first:last] + 1]
            inputs = inputs + parent_projection(parents)
        return inputs if vector is None else inputs + vector.unsqueeze(1)

    def depth_inputs(
        self,
        values: Float[Tensor, "batch steps values width"],
        first_step: int,
        last_step: int,
        first: int,
        last: int,
    ) -> Float[Tensor, "batch steps slots width"]:
        """The depth transformer's inputs at the slots first..last - 1 of some steps.

        `values` holds, per step, the spatial transformer's output and the embeddings of its codes.
        """
        sums = torch.einsum("mn,bsnw->bsmw", self._predecessors[first:last], values)
        types = self.ordering.slot_type[first_step:last_step, first:last]
        return sums + self.slot_embedding[types]

    def project(
        self, hidden: Float[Tensor, "*shape width"], group: int, layer: int
    ) -> Float[Tensor, "*shape codes"]:
        """Logits over one layer's codes, by the weights' precision whatever the autocast."""
        number = sum(m.depth for m in self.config.code_maps[:group]) + layer
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.outputs[number](hidden.to(self.start.dtype))
        return logits if logits.dtype == torch.float64 else logits.float()
