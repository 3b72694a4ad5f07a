"""Counted trials of what can go wrong: kills, full disks, damaged files, hostile checkpoints."""
