"""Probabilities of codes by the prior of stage two, code after code."""

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from pipelines.coding.probabilities import Probabilities, Step, tables_of
from prior import Prior
from prior.incremental_decoder import IncrementalDecoder
from tokenizer.storage.errors import InputError
from tokenizer.storage.hashes import weights_hash


class AutoregressivePrior(Probabilities):
    """By a prior without condition, at its image size.

    In double precision on the CPU, for the reason of `OwnPrior`, and one image at a time. In the
    coarse_to_fine order a part is a group of layers; in the cell order all layers are one.

    Raises:
        InputError: the prior knows conditional probabilities alone.
    """

    def __init__(self, prior: Prior) -> None:
        prior.check_evaluation()
        if not prior.conditioner.has_null:
            raise InputError(
                "model must not be 'prior' with a prior that has no null condition, as it is "
                "trained by label_dropout"
            )
        self.code_maps = prior.config.code_maps
        self.identity = weights_hash(prior.state_dict())
        depths = [code_map.depth for code_map in self.code_maps]
        self._is_by_group = prior.config.network.order == "coarse_to_fine"
        self.parts = depths if self._is_by_group else [sum(depths)]
        prior = copy.deepcopy(prior).cpu().double()
        with torch.no_grad():
            self._condition = prior.null_condition(1)
        self._decoder = IncrementalDecoder(prior, self._condition, 1)

    def __call__(self, indices: Sequence[Int[Tensor, "1 _ _ _"]]) -> Iterator[Step]:
        """All steps, of one code each; `indices` are filled in meanwhile."""
        decoder = self._decoder
        decoder.restart(self._condition)
        ordering = decoder.prior.ordering
        rows, columns = ordering.row.tolist(), ordering.column.tolist()
        for step, slots in enumerate(ordering.steps):
            for slot, (group, _, layer) in enumerate(slots):
                codes = indices[group][0, layer]
                place = rows[step][slot], columns[step][slot]
                positions = torch.zeros_like(codes, dtype=torch.bool)
                positions[place] = True
                tables = tables_of(decoder.next_logits().log_softmax(1))
                part = group if self._is_by_group else 0
                yield Step(part, decoder.layer, codes, positions, tables)
                decoder.append(codes[place].view(1))
