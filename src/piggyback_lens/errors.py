"""The one exception that users are meant to see."""


class LensError(ValueError):
    """Input that would make a number silently wrong.

    The message is one line and says what came, what was expected and what to do about it. The
    command line prints it without a traceback and exits with status 2.
    """
