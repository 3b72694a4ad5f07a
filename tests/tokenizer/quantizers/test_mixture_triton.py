"""The fused kernels: interpreted on a CPU, compiled on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def test_the_interpreted_kernels_give_what_whole_matrices_give() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tokenizer.quantizers.fused_mixture"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this triton is too old for this NumPy")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (700, 37, 5), (4_096, 1_000, 64)])
def test_the_compiled_kernels_give_what_whole_matrices_give(sizes: tuple[int, int, int]) -> None:
    from tests.tokenizer.quantizers.fused_mixture import check, check_noise, check_small_variance
    from tokenizer.quantizers.base import full_precision

    device = torch.device("cuda")
    with full_precision(device):
        check(*sizes, device)
        check_small_variance(device)
        check_noise(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_takes_no_memory_that_grows_with_the_codes() -> None:
    from tokenizer.quantizers.mixture import stochastic_quantization

    peaks = []
    for codes in (1_024, 8_192):
        latents = torch.randn(65_536, 64, device="cuda", requires_grad=True)
        codebook = torch.randn(codes, 64, device="cuda", requires_grad=True)
        variance = torch.tensor(5.0, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        draw = stochastic_quantization(latents, codebook, variance, 0.7, "mixture")
        draw.quantized.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert max(peaks) < 2**30
    assert peaks[1] - peaks[0] < 64 * 2**20  # codebook-sized tensors alone
