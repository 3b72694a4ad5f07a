"""What a family of trials came to."""

from typing import NamedTuple


class Tally(NamedTuple):
    """Counts of one family of trials."""

    tried: int
    survived: int  # handled as promised
    lost: int  # anything else; each has a line in notes
    notes: list[str]
