"""Writes the page about what the codes of a run mean: `python -m pipelines.explain RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("explain")

import shlex
import sys

from pipelines.command import announce, run_command
from pipelines.options import parse_options
from pipelines.page_configs import ExplainConfig
from pipelines.report.explanation import write_explanation


def _run() -> None:
    config = parse_options(ExplainConfig, "pipelines.explain")
    folder = config.output_dir or config.run_dir / "explanation"
    write_explanation(
        config.run_dir,
        folder,
        baseline_dir=config.baseline,
        num_images=config.num_images,
        data_root=config.data_root,
        data_validation_root=config.data_validation_root,
        command="python -m pipelines.explain " + shlex.join(sys.argv[1:]),
    )
    announce(f"open {folder / 'explanation.html'}")


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower num-images if that does not help")


if __name__ == "__main__":
    main()
