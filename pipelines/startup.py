"""What a command does before it imports its libraries, which takes seconds."""

import sys
import warnings
from types import TracebackType


def prepare(verb: str | None = None) -> None:
    """Reads the command line of a verb first, so that help and complaints come at once.

    Lets Ctrl-C end the imports without a traceback, and hides what no user can mend. It changes the
    whole interpreter: for a command alone, not for a program that imports us.
    """
    sys.excepthook = _report
    # timm and torch-fidelity, imported beside a new torch.
    warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", category=DeprecationWarning)
    # torch 2.11 does not know the new name yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", category=FutureWarning)
    # Pillow warns of what it then reads or refuses all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if verb is not None:
        from pipelines import verbs  # here, as importing pydantic can be stopped, too

        verbs.check_command_line(verb)


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
