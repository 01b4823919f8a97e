"""The one base class of every error that a user can cause and mend."""


class GlmlabError(Exception):
    """Bad input or an unmet need; the message says what, why, and how to mend it.

    Every module derives its own errors from this class, so that ``except GlmlabError`` catches what
    a user can mend and nothing else. The command line prints the message without a traceback.
    """
