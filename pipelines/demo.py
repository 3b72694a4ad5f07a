"""The whole job in a few minutes, with nothing to download: `python -m pipelines.demo`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("demo")

import os

import torch

from pipelines.command import run_command
from pipelines.command_configs import DemoConfig
from pipelines.options import parse_options
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.quickstart import train_and_measure


def _run() -> None:
    run_dir = parse_options(DemoConfig, "pipelines.demo").run_dir
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # batches of 16 small images: two threads take longer than one
    name = "shapes32-sqvae2"
    train_and_measure(
        TOKENIZER_PRESETS[name].model_copy(update={"run_dir": run_dir}),
        PRIOR_PRESETS[name].model_copy(update={"run_dir": run_dir}),
        "python -m pipelines.demo",
    )


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
