"""Everything that runs: training, generation, evaluation."""

import warnings

# Raised while timm and torch-fidelity are imported beside a new torch; nothing a user can mend.
warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
# torch 2.11 does not know the new name yet.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
# Pillow warns of what it then reads or refuses all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")

from pipelines.generation import ImageGenerationPipeline  # noqa: E402

__all__ = ["ImageGenerationPipeline"]
