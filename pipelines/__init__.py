"""Everything that runs: training, generation, evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.generation import ImageGenerationPipeline
    from pipelines.tokenizer_pipeline import TokenizerPipeline

__all__ = ["ImageGenerationPipeline", "TokenizerPipeline"]


def __getattr__(name: str) -> Any:
    """Imports a pipeline when it is asked for: a command begins with lighter imports."""
    if name == "ImageGenerationPipeline":
        from pipelines.generation import ImageGenerationPipeline

        return ImageGenerationPipeline
    if name == "TokenizerPipeline":
        from pipelines.tokenizer_pipeline import TokenizerPipeline

        return TokenizerPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
