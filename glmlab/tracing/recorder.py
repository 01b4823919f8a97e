"""Records what PyTorch would allocate on a CUDA device, with the meta device in its place.

Meta tensors have shapes and no data, so a model of any size runs in a few megabytes. A dispatch mode sees every
operation: a new storage is an allocation, its death a free. Where a GPU does something else than the meta device, a
rule of :mod:`glmlab.tracing.cuda_rules` takes the operation's place.

A record is a list of rows (loading, a step, the end of a turn), each a list of events in order.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Allocation(NamedTuple):
    """One allocation: its place in the record, its size, and who asked."""

    row: int
    slot: int
    n_bytes: int
    operation: str
    module: str  # path in the module tree; "" outside the model


@dataclass
class Row:
    """One row of the record. An event is ``id`` (allocation number ``id``) or ``~id`` (its free)."""

    section: str
    turn: int
    context: int
    turn_tokens: int
    events: list[int] = field(default_factory=list)
    slots: int = 0
    is_step: bool = False
    carried: tuple[int, ...] = ()  # allocations that the turn would carry over, were this step its last


class AllocationRecorder:
    """The record: rows of events, every allocation by number, and the owners of those that live on."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.allocations: list[Allocation] = []
        self.owners: dict[int, str] = {}  # of allocations; one that is not here is an activation
        self.module = ""
        self.paused = False
        self._ids: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage -> (allocation or -1, its weak reference)

    def begin(self, section: str, turn: int = 0, context: int = 0, turn_tokens: int = 0) -> Row:
        """Start a row; what follows belongs to it."""
        self.rows.append(Row(section, turn, context, turn_tokens))
        return self.rows[-1]

    def run_in(self, path: str) -> None:
        """What follows is asked for by the module of this path."""
        self.module = path

    def allocate(self, n_bytes: int, operation: str) -> int:
        """Note an allocation; return its number."""
        row = self.rows[-1]
        number = len(self.allocations)
        self.allocations.append(Allocation(len(self.rows) - 1, row.slots, n_bytes, operation, self.module))
        row.slots += 1
        row.events.append(number)
        return number

    def free(self, number: int) -> None:
        """Note the free of allocation ``number``."""
        self.rows[-1].events.append(~number)

    def temporary(self, operation: str, *sizes: int) -> None:
        """Note what an operation allocates inside and frees again: all of ``sizes`` alive together."""
        numbers = [self.allocate(size, operation) for size in sizes if size > 0]
        for number in reversed(numbers):
            self.free(number)

    def see(self, tensor: Tensor, operation: str) -> None:
        """Note the storage of a tensor if it is new and on the device."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ids:
            return
        n_bytes = storage.nbytes()
        if n_bytes == 0:
            return
        number = -1 if self.paused else self.allocate(n_bytes, operation)

        def died(_: object, ids: dict[int, Any] = self._ids, key: int = key, number: int = number) -> None:
            if ids.pop(key, None) is not None and number >= 0:
                self.free(number)

        self._ids[key] = (number, weakref.ref(storage, died))

    def number_of(self, tensor: Tensor) -> int:
        """Number of the allocation that holds a tensor, -1 for a storage that was never recorded."""
        return self._ids.get(tensor.untyped_storage()._cdata, (-1, None))[0]

    def live(self) -> list[int]:
        """Numbers of the allocations that are alive."""
        return sorted(number for number, _ in self._ids.values() if number >= 0)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Storages born within are not recorded, nor is their death (they stand for host memory)."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


Rule = Callable[[AllocationRecorder, Any, tuple[Any, ...], dict[str, Any]], Any]
"""``rule(recorder, func, args, kwargs) -> result``; NotImplemented leaves the operation to PyTorch."""


@contextlib.contextmanager
def record_allocations(
    recorder: AllocationRecorder,
    *,
    operations: Mapping[Any, Rule] | None = None,
    functions: Mapping[str, Rule] | None = None,
) -> Iterator[AllocationRecorder]:
    """Record everything within; rules by ATen operation, and by name of a function of ``torch.nn.functional``.

    A function that PyTorch composes of operations cannot be replaced below its name.
    """

    def with_rule(func: Any, rule: Rule) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            result = rule(recorder, func, args, kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result

        return replaced

    with contextlib.ExitStack() as stack:
        for name, rule in (functions or {}).items():
            stack.enter_context(patch.object(F, name, with_rule(getattr(F, name), rule)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Storages(recorder, operations or {}))
        yield recorder


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every new storage on the device is an allocation."""

    def __init__(self, recorder: AllocationRecorder, rules: Mapping[Any, Rule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder, self.rules = recorder, rules
        self.names: dict[Any, str] = {}
        self.results: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.names:
            self.names[func] = str(func)
        rule = self.rules.get(func)
        result = NotImplemented if rule is None else rule(self.recorder, func, args, kwargs)
        if result is NotImplemented:
            result = self._run(func, args, kwargs)
        if isinstance(result, Tensor):
            self.recorder.see(result, self.names[func])
        elif isinstance(result, (tuple, list)):
            for part in result:
                if isinstance(part, Tensor):
                    self.recorder.see(part, self.names[func])
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or make anew what it gave for arguments of the same shapes: layers repeat each other."""
        if not _gives_fresh_tensor(func):
            return func(*args, **kwargs)
        try:
            key = (func, _signature(args), _signature(tuple(kwargs.items())))
            known = self.results.get(key)
        except TypeError:  # an argument without a hash
            return func(*args, **kwargs)
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device=META)
        result = func(*args, **kwargs)
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        if result.device.type == "meta" and result.untyped_storage()._cdata not in inputs:  # _unsafe_view is a view
            whole = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=META)
            if whole.untyped_storage().nbytes() == result.untyped_storage().nbytes():
                self.results[key] = (tuple(result.shape), result.stride(), result.dtype)
        return result


@functools.cache
def _gives_fresh_tensor(func: Any) -> bool:
    """Whether an operation's only result is one tensor that shares memory with no argument."""
    schema = func._schema
    if any(argument.alias_info is not None for argument in (*schema.arguments, *schema.returns)):
        return False
    return len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.TensorType)


def _signature(value: Any) -> Any:
    """What the result's shape can depend on, hashable."""
    if isinstance(value, Tensor):
        return (type(value), value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, (tuple, list)):
        return tuple([_signature(part) for part in value])
    return (type(value), value)
