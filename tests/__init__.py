"""The tests: a file for each module, named after it."""
