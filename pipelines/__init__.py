"""Everything that runs: training, generation, evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.generation import ImageGenerationPipeline

__all__ = ["ImageGenerationPipeline"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline when it is asked for: a command begins with lighter imports."""
    if name == "ImageGenerationPipeline":
        from pipelines.generation import ImageGenerationPipeline

        return ImageGenerationPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
