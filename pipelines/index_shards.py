"""Says where images lie in tar shards: `python -m pipelines.index_shards SHARDS`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("index-shards")

from pipelines.command import announce, run_command
from pipelines.data.shard_index import index_shards
from pipelines.index_config import IndexShardsConfig
from pipelines.options import parse_options

_MOST_SHOWN = 20


def _run() -> None:
    config = parse_options(IndexShardsConfig, "pipelines.index_shards")
    found = index_shards(config)
    for line in found.left_out[:_MOST_SHOWN]:
        announce(f"left out: {line}")
    if len(found.left_out) > _MOST_SHOWN:
        announce(f"and {len(found.left_out) - _MOST_SHOWN} more")
    announce(
        f"{found.num_images:,} images of {len(found.class_names):,} classes in "
        f"{found.num_shards:,} shards, {len(found.left_out):,} samples or shards left out; "
        f"--data.dataset shards --data.root {config.output_dir}"
    )


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
