"""The one error that is the user's to mend: drivers print it as one line and exit with code 2."""


class UserError(Exception):
    """What is wrong, in which file, and what to do, in one line."""
