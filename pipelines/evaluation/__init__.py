"""Measuring: distances, errors, rates, and the protocol of each number."""
