"""Saved models: strict configs, atomic files, and reading what a stranger may have written."""
