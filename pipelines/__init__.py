"""Everything that runs: training, generation, evaluation."""

import sys
import warnings
from types import TracebackType


def _stop(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ctrl-C is no bug and needs no traceback, also while the libraries are being imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # a command is starting, not a program that imports us
    sys.excepthook = _stop

# Raised while timm and torch-fidelity are imported beside a new torch; nothing a user can mend.
warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
# torch 2.11 does not know the new name yet.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
# Pillow warns of what it then reads or refuses all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")

from pipelines.generation import ImageGenerationPipeline  # noqa: E402

__all__ = ["ImageGenerationPipeline"]
