"""Where the suite's own data lies: the checkout's ``data/``, or its copy inside an installed wheel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmlab.core.errors import GlmlabError

_PACKAGE = Path(__file__).resolve().parent.parent


def data_path(*parts: str) -> Path:
    """Path of a file or folder of ``data/``; :class:`~glmlab.core.errors.GlmlabError` when it is not there.

    Example:
        >>> data_path("configs", "chatglm3-6b.json").name
        'chatglm3-6b.json'
    """
    roots = (_PACKAGE.parent / "data", _PACKAGE / "_data")
    for root in roots:
        candidate = root.joinpath(*parts)
        if candidate.exists():
            return candidate
    raise GlmlabError(
        f"data/{'/'.join(parts)} is missing from this installation. "
        "Install glmlab from a full checkout: pip install -e ."
    )


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
