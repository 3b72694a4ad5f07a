"""What all tests share: one thread, fixed seeds, hypothesis without a clock."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# No deadline: a shared machine is slow at times. The same examples in every run.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
