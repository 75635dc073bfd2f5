"""The one exception that means "the user can mend this": commands turn it into a line and exit code 2."""


class UserError(Exception):
    """A mistake in what the user gave (a path, a name, a value, SQL); the message names it and the mend.

    Anything else that escapes is a fault of ours: it keeps its traceback and exits with 1.
    """
