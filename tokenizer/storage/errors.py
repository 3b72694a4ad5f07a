"""What a user can mend."""


class InputError(ValueError):
    """Something a user gave is wrong; the message is one line and names the field."""
