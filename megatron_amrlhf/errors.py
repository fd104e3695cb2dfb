"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the user's input: printed as one line on stderr, exit code 2.

    The message says what is wrong, where, and what to do about it.
    """
