"""How well a tokenizer reconstructs a data set, and how it uses its codes."""

import numpy as np
import torch
from accelerate import Accelerator

from pipelines.data.dataset import ImageDataset, image_shape
from pipelines.evaluation.metrics import CodeUsage, ImageErrors, image_errors
from pipelines.images import to_float, to_uint8
from pipelines.processes import gather_shares, own_share, sum_over_processes
from tokenizer import Tokenizer


def measure_reconstruction(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    items: np.ndarray,
    accelerator: Accelerator,
    batch_size: int = 250,
) -> tuple[ImageErrors, CodeUsage]:
    """Errors of these images after 8-bit rounding, and the counts of their hard codes.

    The work is shared by all processes; each gets the whole result.
    """
    _, height, width = image_shape(dataset)
    usage = CodeUsage(tokenizer.code_maps(height, width))
    own_items = items[own_share(accelerator, len(items))]
    columns = []
    for start in range(0, len(own_items), batch_size):
        images = dataset.images_at(own_items[start : start + batch_size])
        indices = tokenizer.encode(to_float(images).to(accelerator.device))
        usage.update([own.cpu() for own in indices])
        errors = image_errors(images, to_uint8(tokenizer.decode(indices)).cpu())
        columns.append(torch.stack(errors, 1))
    rows = torch.cat(columns) if columns else torch.zeros(0, 3, dtype=torch.float64)
    usage.counts = [sum_over_processes(accelerator, counts) for counts in usage.counts]
    return ImageErrors(*gather_shares(accelerator, rows, len(items)).unbind(1)), usage
