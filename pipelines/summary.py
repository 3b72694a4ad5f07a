"""Writes the page about a run: `python -m pipelines.summary RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("summary")

from pipelines.command import announce, run_command
from pipelines.options import parse_options
from pipelines.page_configs import SummaryConfig
from pipelines.report.summary import write_summary


def _run() -> None:
    config = parse_options(SummaryConfig, "pipelines.summary")
    path = config.output or config.run_dir / "summary.html"
    write_summary(
        config.run_dir,
        path,
        title=config.title,
        data_root=config.data_root,
        data_validation_root=config.data_validation_root,
    )
    announce(f"open {path}")


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
