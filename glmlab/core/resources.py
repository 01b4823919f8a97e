"""Folders and environment variables: the suite's own data, its cache, a variable set for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
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


def cache_folder() -> Path:
    """Where the suite caches what it can make again: ``$GLMLAB_CACHE``, or ``glmlab`` in the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("GLMLAB_CACHE") or user_cache_path("glmlab", appauthor=False))


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


def source_date() -> datetime | None:
    """The moment that SOURCE_DATE_EPOCH names, so that a rebuilt file is the same file; None where it is not set.

    Raises:
        GlmlabError: it is set to something else than seconds since 1970.

    Example:
        >>> with environment_variable("SOURCE_DATE_EPOCH", "0"):
        ...     source_date().isoformat()
        '1970-01-01T00:00:00+00:00'
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    try:
        return datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise GlmlabError(
            f"SOURCE_DATE_EPOCH is {epoch!r}, not a number of seconds since 1970. Set it to one, or unset it."
        ) from error
