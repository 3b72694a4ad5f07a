"""Where and from what a result came."""

import os
import platform
import subprocess

import torch


def commit() -> str:
    """The project's commit, from git."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def origin(command: str) -> dict[str, object]:
    """How a result came about: command, commit, machine and torch."""
    return {
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "torch": torch.__version__,
    }


def machine() -> dict[str, str | int | None]:
    """Processor, cores, GPU and Python."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
