"""Where the suite's own data lies: the checkout's ``data/``, or its copy inside an installed wheel."""

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
