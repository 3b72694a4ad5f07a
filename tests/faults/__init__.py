"""Counted trials of what can go wrong: kills, full disks, damaged files, hostile checkpoints."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: hundreds of runs
