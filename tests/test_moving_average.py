"""The moving average of the weights."""

import torch
from timm.utils.model_ema import ModelEmaV3

from pipelines.moving_average import MovingAverage
from pipelines.presets import TOKENIZER_PRESETS
from tokenizer import Tokenizer


def test_the_average_is_that_of_timm_bit_for_bit() -> None:
    model = Tokenizer(TOKENIZER_PRESETS["tiny-baseline"].tokenizer)  # codebooks are buffers
    ours, theirs = MovingAverage(model, 0.7), ModelEmaV3(model, decay=0.7, use_warmup=True)
    for step in range(1, 20):
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor))
        ours.update(step)
        theirs.update(model, step=step)
        expected = theirs.module.state_dict()
        assert all(torch.equal(own, expected[k]) for k, own in ours.module.state_dict().items())
    assert not ours.module.training


def test_weights_that_move_to_other_memory_are_followed() -> None:
    model = Tokenizer(TOKENIZER_PRESETS["tiny"].tokenizer)
    average = MovingAverage(model, 0.0)
    for parameter in model.parameters():
        parameter.data = parameter.data + 1
    average.update(1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(average.module.state_dict()[name], tensor)
