"""The one base class of every error that a user can cause and repair."""


class GlmlabError(Exception):
    """Bad input or an unmet need; the message says what is wrong, why, and what to do.

    A room derives an error of its own where someone catches it by name. The command line prints the message without a
    traceback.
    """
