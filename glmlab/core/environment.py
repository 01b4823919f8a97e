"""Environment variables that libraries read, set for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of this process while the context lasts; afterwards it is as it was.

    The environment belongs to the whole process: other threads see the value, too.

    Example:
        >>> with environment_variable("GLMLAB_EXAMPLE", "1"):
        ...     os.environ["GLMLAB_EXAMPLE"]
        '1'
        >>> "GLMLAB_EXAMPLE" in os.environ
        False
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
