"""Which module of a model is running: one stack of paths, kept by forward hooks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def follow_modules(
    modules: Iterable[tuple[str, nn.Module]], enter: Callable[[str], object], leave: Callable[[str], object]
) -> Iterator[None]:
    """Call ``enter(path)`` before each module's forward pass and ``leave(path of the module around it)`` after it.

    Args:
        modules: paths and modules, such as ``model.named_modules()``; passes may nest.
        enter: is told the module that begins.
        leave: is told the module that goes on, "" outside of all of them.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.ReLU())
        >>> with follow_modules(model.named_modules(), lambda path: print("into", path or "the model"), print):
        ...     _ = model(torch.zeros(1))
        into the model
        into 0
        <BLANKLINE>
        <BLANKLINE>
    """
    running = [""]
    handles = []

    def begin(path: str) -> None:
        running.append(path)
        enter(path)

    def end(*_: object) -> None:
        running.pop()
        leave(running[-1])

    for path, module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: begin(path)))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
