"""The console command `hqvae`: `hqvae VERB ...` runs `python -m pipelines.VERB ...`."""

import importlib
import os
import sys
from importlib.metadata import version

from pipelines import startup


def main() -> None:
    """Runs a verb with the rest of the command line; lists the verbs if there is none.

    --version prints the version.
    """
    startup.prepare()
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what was read of it is enough, as with `hqvae --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> None:
    from pipelines.options import did_you_mean, fail
    from pipelines.verbs import VERBS, check_command_line

    verb, *arguments = sys.argv[1:] or [""]
    if verb in {"", "-h", "--help"}:
        width = max(map(len, VERBS))
        lines = "\n".join(f"  {name:{width}}  {entry.summary}" for name, entry in VERBS.items())
        print(f"usage: hqvae VERB ...\n\n{lines}\n\nMore about one of them: hqvae VERB --help")
        raise SystemExit(0 if verb else 2)
    if verb == "--version":
        print(f"hqvae {version('hqvae')}")
        raise SystemExit(0)
    if verb not in VERBS:
        hint = did_you_mean(verb.replace("_", "-"), VERBS) or f"give one of {', '.join(VERBS)}"
        fail(f"unknown verb {verb!r}: {hint}")
    sys.argv = [f"hqvae {verb}", *arguments]
    check_command_line(verb)
    importlib.import_module(f"pipelines.{verb.replace('-', '_')}").main()
