"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake in the user's input. The message is one line: what is wrong and what to do."""
