"""The caching allocator and the replay of event programs, compiled: about ten nanoseconds an event.

The rules are those of :mod:`glmlab.allocator.caching`; tests hold both forms to equal results. What makes it fast:

- Sizes and addresses count in units of 512 B and fit 32 bits; a block is a record of seven numbers, named by its
  offset.
- Idle blocks of the small pool hang in 4,096 lists, one a size, each by address; a bitmap with a summary word finds the
  best fit in two find-first-set instructions.
- Idle blocks of the large pool hang in lists of similar sizes (64 between a power of two and the next), each by size,
  then address. With expandable segments those of the small pool do too, because they can have any size.
- Memory is addressed through raw pointers (numba's arrays carry seven numbers each, which would fill the registers),
  and every function is inlined into one kernel. There are no bounds checks: the caller checks the program, and the
  kernel stops before a row that could need more records than are left.

All kernels are in this one file, because numba's disk cache does not see edits in imported files.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# Fields of a block record, as byte offsets; NONE instead of an offset: no block.
ADDRESS, SIZE, PREV, NEXT, STATE, LIST_PREV, LIST_NEXT, RECORD_BYTES = 0, 4, 8, 12, 16, 20, 24, 32
NONE = -1
# Bits of STATE; live blocks have neither IDLE nor UNMAPPED.
IDLE, LARGE, UNMAPPED, OWNER_SHIFT = 1, 2, 4, 3
# Counters and settings, as byte offsets into one int64 array; sizes in units.
RESERVED, ALLOCATED, PEAK, PEAK_SMALL, ALLOCATED_SMALL, RESERVED_SMALL = 0, 8, 16, 24, 32, 40
TOP, LOWEST, SEGMENTS_MADE, RECORDS_USED, SPACE_SMALL, SPACE_LARGE = range(48, 96, 8)
CAPACITY, SEED, EXPANDABLE, MAX_SPLIT, NON_SPLIT_ROUNDING, LARGE_SEGMENT = range(96, 144, 8)
ROW, EVENT, GROWTHS, GROWTH_CAPACITY, RECORD_CAPACITY, FAILED_SIZE, TURN = range(144, 200, 8)
COUNTERS = 25
NO_SEED, NO_LIMIT = -1, 1 << 40

SMALL_LIMIT, SMALL_SEGMENT, LARGE_LIMIT = 2048, 4096, 20480  # units: 1 MiB, 2 MiB, 10 MiB
# Byte offsets into `lists` (int32 heads) and `bitmaps` (int64 words, then a summary of them): one list a size for the
# small pool, then lists of similar sizes for the small pool (expandable segments) and the large pool.
EXACT_LISTS, SIMILAR_SMALL_LISTS, SIMILAR_LARGE_LISTS, LIST_COUNT = 0, 4096 * 4, 6144 * 4, 8192
EXACT_BITS, SIMILAR_SMALL_BITS, SIMILAR_LARGE_BITS, WORD_COUNT = 0, 65 * 8, 130 * 8, 195
SUMMARY = 64 * 8
EXPANDABLE_SPACE = 1 << 30
LANES = 4  # rows whose slots are remembered
CODE_AGE_SHIFT, CODE_SLOT_MASK = 20, (1 << 20) - 1
CODE_FIRST, CODE_CARRIED, CODE_EMPTY_CACHE = 4 << CODE_AGE_SHIFT, 5 << CODE_AGE_SHIFT, 6 << CODE_AGE_SHIFT
OWNER_BITS = 5
DONE, NEEDS_ROOM, OUT_OF_MEMORY, BAD_FREE = range(4)


def _compiled(function: F) -> F:
    compiled: F = numba.njit(error_model="numpy", boundscheck=False)(function)
    return compiled


def _inlined(function: F) -> F:
    compiled: F = numba.njit(error_model="numpy", boundscheck=False, forceinline=True)(function)
    return compiled


def _entry(function: F) -> F:
    # the cache on disk holds everything that the function calls, too
    compiled: F = numba.njit(cache=True, error_model="numpy", boundscheck=False)(function)
    return compiled


def _pointer(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _loader(bits: int) -> Callable[[int, int], int]:
    @intrinsic  # type: ignore[untyped-decorator]
    def load(_context: Any, base: Any, offset: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args[0], args[1], ir.IntType(bits)))
            return value if bits == 64 else builder.sext(value, ir.IntType(64))

        return types.int64(types.int64, types.int64), generate

    loader: Callable[[int, int], int] = load
    return loader


def _storer(bits: int) -> Callable[[int, int, int], None]:
    @intrinsic  # type: ignore[untyped-decorator]
    def store(context: Any, base: Any, offset: Any, value: Any) -> Any:
        def generate(c: Any, builder: Any, _s: Any, args: Any) -> Any:
            value = args[2] if bits == 64 else builder.trunc(args[2], ir.IntType(bits))
            builder.store(value, _pointer(builder, args[0], args[1], ir.IntType(bits)))
            return c.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    storer: Callable[[int, int, int], None] = store
    return storer


_get32, _set32, _get64, _set64 = _loader(32), _storer(32), _loader(64), _storer(64)


def _bit_finder(instruction: str) -> Callable[[int], int]:
    @intrinsic  # type: ignore[untyped-decorator]
    def find(_context: Any, word: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], ir.Constant(ir.IntType(1), 0))

        return types.int64(types.int64), generate

    finder: Callable[[int], int] = find
    return finder


_zeros_below = _bit_finder("cttz")  # zero bits below the lowest bit set
_zeros_above = _bit_finder("ctlz")  # zero bits above the highest bit set


# -- lists of idle blocks ----------------------------------------------------------------------------------------------
# `memory` is the tuple of pointers that every function needs: records, lists, bitmaps, spare records, counters.


@_inlined
def _key(records: int, block: int) -> int:
    return (_get32(records, block + SIZE) << 32) + _get32(records, block + ADDRESS)


@_inlined
def _similar_class(size: int) -> int:
    """Return the list of similar sizes: exact below 64 units, then 64 lists for every power of two."""
    power = 63 - _zeros_above(size)
    return size if power < 6 else (power - 5) * 64 + ((size >> (power - 6)) & 63)


@_inlined
def _next_class(bitmap: int, first: int) -> int:
    """Return the first list that is not empty, from ``first`` on, or NONE."""
    word = first >> 6
    bits = _get64(bitmap, word * 8) & (-1 << (first & 63))
    if bits == 0:
        words = _get64(bitmap, SUMMARY) & (-2 << word)
        if words == 0:
            return NONE
        word = _zeros_below(words)
        bits = _get64(bitmap, word * 8)
    return word * 64 + _zeros_below(bits)


@_inlined
def _list_add(records: int, lists: int, bitmap: int, which: int, block: int) -> None:
    key = _key(records, block)
    before, after = NONE, _get32(lists, which * 4)
    while after >= 0 and _key(records, after) < key:
        before, after = after, _get32(records, after + LIST_NEXT)
    _set32(records, block + LIST_PREV, before)
    _set32(records, block + LIST_NEXT, after)
    if after >= 0:
        _set32(records, after + LIST_PREV, block)
    if before >= 0:
        _set32(records, before + LIST_NEXT, block)
    else:
        _set32(lists, which * 4, block)
        if after < 0:
            word = which >> 6
            _set64(bitmap, word * 8, _get64(bitmap, word * 8) | (1 << (which & 63)))
            _set64(bitmap, SUMMARY, _get64(bitmap, SUMMARY) | (1 << word))


@_inlined
def _list_remove(records: int, lists: int, bitmap: int, which: int, block: int) -> None:
    before, after = _get32(records, block + LIST_PREV), _get32(records, block + LIST_NEXT)
    if after >= 0:
        _set32(records, after + LIST_PREV, before)
    if before >= 0:
        _set32(records, before + LIST_NEXT, after)
    else:
        _set32(lists, which * 4, after)
        if after < 0:
            word = which >> 6
            bits = _get64(bitmap, word * 8) & ~(1 << (which & 63))
            _set64(bitmap, word * 8, bits)
            if bits == 0:
                _set64(bitmap, SUMMARY, _get64(bitmap, SUMMARY) & ~(1 << word))


@_inlined
def _idle_add(memory: tuple[int, ...], block: int) -> None:
    records, lists, bitmaps, _, counters = memory
    size = _get32(records, block + SIZE)
    if _get32(records, block + STATE) & LARGE:
        which = _similar_class(size)
        _list_add(records, lists + SIMILAR_LARGE_LISTS, bitmaps + SIMILAR_LARGE_BITS, which, block)
    elif _get64(counters, EXPANDABLE):
        which = _similar_class(size)
        _list_add(records, lists + SIMILAR_SMALL_LISTS, bitmaps + SIMILAR_SMALL_BITS, which, block)
    else:
        _list_add(records, lists, bitmaps, size - 1, block)


@_inlined
def _idle_remove(memory: tuple[int, ...], block: int) -> None:
    records, lists, bitmaps, _, counters = memory
    size = _get32(records, block + SIZE)
    if _get32(records, block + STATE) & LARGE:
        which = _similar_class(size)
        _list_remove(records, lists + SIMILAR_LARGE_LISTS, bitmaps + SIMILAR_LARGE_BITS, which, block)
    elif _get64(counters, EXPANDABLE):
        which = _similar_class(size)
        _list_remove(records, lists + SIMILAR_SMALL_LISTS, bitmaps + SIMILAR_SMALL_BITS, which, block)
    else:
        _list_remove(records, lists, bitmaps, size - 1, block)


@_inlined
def _similar_find(memory: tuple[int, ...], size: int, large: int) -> int:
    """Return the smallest idle block of at least ``size`` units in the lists of similar sizes, or NONE."""
    records = memory[0]
    lists = memory[1] + (SIMILAR_LARGE_LISTS if large else SIMILAR_SMALL_LISTS)
    bitmap = memory[2] + (SIMILAR_LARGE_BITS if large else SIMILAR_SMALL_BITS)
    which = _similar_class(size)
    block = _get32(lists, which * 4)
    while block >= 0 and _get32(records, block + SIZE) < size:
        block = _get32(records, block + LIST_NEXT)
    if block >= 0:
        return block
    which = _next_class(bitmap, which + 1)
    return _get32(lists, which * 4) if which >= 0 else NONE


@_inlined
def _similar_after(memory: tuple[int, ...], block: int, large: int) -> int:
    """Return the idle block next in order of size and address, or NONE."""
    records = memory[0]
    lists = memory[1] + (SIMILAR_LARGE_LISTS if large else SIMILAR_SMALL_LISTS)
    bitmap = memory[2] + (SIMILAR_LARGE_BITS if large else SIMILAR_SMALL_BITS)
    after = _get32(records, block + LIST_NEXT)
    if after >= 0:
        return after
    which = _next_class(bitmap, _similar_class(_get32(records, block + SIZE)) + 1)
    return _get32(lists, which * 4) if which >= 0 else NONE


# -- blocks ------------------------------------------------------------------------------------------------------------


@_inlined
def _new_record(memory: tuple[int, ...], address: int, size: int, state: int) -> int:
    records, _, _, spare, counters = memory
    used = _get64(counters, RECORDS_USED)
    _set64(counters, RECORDS_USED, used + 1)
    block = _get32(spare, used * 4)
    _set32(records, block + ADDRESS, address)
    _set32(records, block + SIZE, size)
    _set32(records, block + PREV, NONE)
    _set32(records, block + NEXT, NONE)
    _set32(records, block + STATE, state)
    return block


@_inlined
def _drop_record(memory: tuple[int, ...], block: int) -> None:
    used = _get64(memory[4], RECORDS_USED) - 1
    _set64(memory[4], RECORDS_USED, used)
    _set32(memory[3], used * 4, block)


@_inlined
def _cut(memory: tuple[int, ...], block: int, size: int, state: int) -> int:
    """Cut a block behind ``size`` units; returns the new block behind the cut."""
    records = memory[0]
    rest = _new_record(memory, _get32(records, block + ADDRESS) + size, _get32(records, block + SIZE) - size, state)
    after = _get32(records, block + NEXT)
    _set32(records, rest + PREV, block)
    _set32(records, rest + NEXT, after)
    if after >= 0:
        _set32(records, after + PREV, rest)
    _set32(records, block + NEXT, rest)
    _set32(records, block + SIZE, size)
    return rest


@_inlined
def _absorb_next(memory: tuple[int, ...], block: int) -> None:
    records = memory[0]
    gone = _get32(records, block + NEXT)
    after = _get32(records, gone + NEXT)
    _set32(records, block + SIZE, _get32(records, block + SIZE) + _get32(records, gone + SIZE))
    _set32(records, block + NEXT, after)
    if after >= 0:
        _set32(records, after + PREV, block)
    _drop_record(memory, gone)


@_inlined
def _melt(memory: tuple[int, ...], block: int, state: int) -> int:
    """Join a block that is in no list with idle neighbours and list it; ``state`` is its new one."""
    records = memory[0]
    left = _get32(records, block + PREV)
    if left >= 0 and _get32(records, left + STATE) & IDLE:
        _idle_remove(memory, left)
        _absorb_next(memory, left)
        block = left
    right = _get32(records, block + NEXT)
    if right >= 0 and _get32(records, right + STATE) & IDLE:
        _idle_remove(memory, right)
        _absorb_next(memory, block)
    _set32(records, block + STATE, state)
    _idle_add(memory, block)
    return block


@_inlined
def _free(memory: tuple[int, ...], block: int) -> int:
    """Free a live block; returns its owner, or NONE where it is not live."""
    records, counters = memory[0], memory[4]
    state = _get32(records, block + STATE)
    if state & (IDLE | UNMAPPED):
        return NONE
    size = _get32(records, block + SIZE)
    _set64(counters, ALLOCATED, _get64(counters, ALLOCATED) - size)
    if not state & LARGE:
        _set64(counters, ALLOCATED_SMALL, _get64(counters, ALLOCATED_SMALL) - size)
    _melt(memory, block, (state & LARGE) | IDLE)
    return state >> OWNER_SHIFT


# -- the driver: rare, so not inlined --------------------------------------------------------------------------------


@_compiled
def _next_address(counters: int, size: int) -> int:
    made, seed = _get64(counters, SEGMENTS_MADE), _get64(counters, SEED)
    _set64(counters, SEGMENTS_MADE, made + 1)
    if seed != NO_SEED:
        # The coin of glmlab.allocator.addresses; unsigned, because numba promises LLVM that signed products never wrap.
        x = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(made + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        if x >> np.uint64(63):
            lowest = _get64(counters, LOWEST) - size
            _set64(counters, LOWEST, lowest)
            return lowest
    top = _get64(counters, TOP)
    _set64(counters, TOP, top + size)
    return top


@_compiled
def _grow(memory: tuple[int, ...], growth: int, state: int, size: int) -> bool:
    """Count ``size`` units from the driver, if it has them."""
    counters = memory[4]
    if _get64(counters, RESERVED) + size > _get64(counters, CAPACITY):
        return False
    _set64(counters, RESERVED, _get64(counters, RESERVED) + size)
    if not state & LARGE:
        _set64(counters, RESERVED_SMALL, _get64(counters, RESERVED_SMALL) + size)
    grown = _get64(counters, GROWTHS)
    _set64(counters, GROWTHS, grown + 1)
    _set64(growth, grown * 32, _get64(counters, ROW))
    _set64(growth, grown * 32 + 8, _get64(counters, EVENT))
    _set64(growth, grown * 32 + 16, size)
    _set64(growth, grown * 32 + 24, 1 if state & LARGE else 0)
    return True


@_compiled
def _shrink(memory: tuple[int, ...], state: int, size: int) -> None:
    counters = memory[4]
    _set64(counters, RESERVED, _get64(counters, RESERVED) - size)
    if not state & LARGE:
        _set64(counters, RESERVED_SMALL, _get64(counters, RESERVED_SMALL) - size)


@_compiled
def _segment_size(counters: int, size: int) -> int:
    if size <= SMALL_LIMIT:
        return SMALL_SEGMENT
    if size < LARGE_LIMIT:
        return _get64(counters, LARGE_SEGMENT)
    return (size + 4095) // 4096 * 4096


@_compiled
def _page(counters: int, state: int) -> int:
    return _get64(counters, LARGE_SEGMENT) if state & LARGE else SMALL_SEGMENT


@_compiled
def _map(memory: tuple[int, ...], growth: int, hole: int, size: int) -> int:
    """Map the front of a hole; returns the idle block it becomes part of, or NONE without memory."""
    records = memory[0]
    state = _get32(records, hole + STATE)
    if not _grow(memory, growth, state, size):
        return NONE
    if size < _get32(records, hole + SIZE):
        _cut(memory, hole, size, state)
    return _melt(memory, hole, (state & LARGE) | IDLE)


@_compiled
def _expand(memory: tuple[int, ...], growth: int, size: int, large: int) -> int:
    """Map what an expandable segment lacks for a request; returns the idle block, or NONE without memory."""
    records, counters = memory[0], memory[4]
    space = SPACE_LARGE if large else SPACE_SMALL
    if _get64(counters, space) == NONE:
        address = _next_address(counters, EXPANDABLE_SPACE)
        _set64(counters, space, _new_record(memory, address, EXPANDABLE_SPACE, UNMAPPED | large))
    block = _get64(counters, space)
    while block >= 0:  # the lowest hole that has the room, with the idle block before it
        if _get32(records, block + STATE) & UNMAPPED:
            start = _get32(records, block + PREV)
            if start < 0 or not _get32(records, start + STATE) & IDLE:
                start = block
            have, walk = 0, start
            while walk >= 0 and have < size and _get32(records, walk + STATE) & (IDLE | UNMAPPED):
                have += _get32(records, walk + SIZE)
                walk = _get32(records, walk + NEXT)
            if have >= size:
                break
        block = _get32(records, block + NEXT)
    if block < 0:
        return NONE
    block, have, page = start, 0, _page(counters, large)
    while True:
        if _get32(records, block + STATE) & UNMAPPED:
            lacks = (min(size - have, _get32(records, block + SIZE)) + page - 1) // page * page
            block = _map(memory, growth, block, lacks)
            if block < 0:
                return NONE
        have = _get32(records, block + SIZE)
        if have >= size:
            return block
        block = _get32(records, block + NEXT)


@_compiled
def _ask_driver(memory: tuple[int, ...], growth: int, size: int, large: int) -> int:
    """Return an idle, listed block from the driver, or NONE without memory."""
    counters = memory[4]
    if _get64(counters, EXPANDABLE):
        return _expand(memory, growth, size, large)
    n_units = _segment_size(counters, size)
    if not _grow(memory, growth, large, n_units):
        return NONE
    block = _new_record(memory, _next_address(counters, n_units), n_units, IDLE | large)
    _idle_add(memory, block)
    return block


@_compiled
def _release(memory: tuple[int, ...], block: int) -> None:
    """Give a whole idle segment back to the driver."""
    records = memory[0]
    _idle_remove(memory, block)
    _shrink(memory, _get32(records, block + STATE), _get32(records, block + SIZE))
    _drop_record(memory, block)


@_compiled
def _unmap(memory: tuple[int, ...], block: int) -> None:
    """Give the whole pages of an idle block of an expandable segment back to the driver."""
    records, counters = memory[0], memory[4]
    state, size = _get32(records, block + STATE), _get32(records, block + SIZE)
    page = _page(counters, state)
    base = _get32(records, _get64(counters, SPACE_LARGE if state & LARGE else SPACE_SMALL) + ADDRESS)
    offset = _get32(records, block + ADDRESS) - base
    begin, end = (offset + page - 1) // page * page, (offset + size) // page * page
    if begin >= end:
        return
    _idle_remove(memory, block)
    if begin > offset:
        rest = _cut(memory, block, begin - offset, state)
        _idle_add(memory, block)
        block = rest
    if end - begin < _get32(records, block + SIZE):
        _idle_add(memory, _cut(memory, block, end - begin, state))
    _shrink(memory, state, end - begin)
    _set32(records, block + STATE, (state & LARGE) | UNMAPPED)
    right = _get32(records, block + NEXT)
    if right >= 0 and _get32(records, right + STATE) & UNMAPPED:
        _absorb_next(memory, block)
    left = _get32(records, block + PREV)
    if left >= 0 and _get32(records, left + STATE) & UNMAPPED:
        _absorb_next(memory, left)


@_compiled
def _empty_cache(memory: tuple[int, ...]) -> None:
    records, counters = memory[0], memory[4]
    if _get64(counters, EXPANDABLE):
        for space in (SPACE_LARGE, SPACE_SMALL):
            block = _get64(counters, space)
            while block >= 0:
                if _get32(records, block + STATE) & IDLE:
                    _unmap(memory, block)
                block = _get32(records, block + NEXT)
        return
    block = _similar_find(memory, 1, LARGE)
    while block >= 0:
        after = _similar_after(memory, block, LARGE)
        if _get32(records, block + PREV) < 0 and _get32(records, block + NEXT) < 0:
            _release(memory, block)
        block = after
    block = _get32(memory[1], (SMALL_SEGMENT - 1) * 4)
    while block >= 0:  # an idle block of the small pool that is as large as a segment is one
        after = _get32(records, block + LIST_NEXT)
        _release(memory, block)
        block = after


@_compiled
def _release_for(memory: tuple[int, ...], size: int, large: int) -> bool:
    """Release oversize blocks for a request of the large pool, if splitting is limited; says whether they suffice."""
    records, counters = memory[0], memory[4]
    limit = _get64(counters, MAX_SPLIT)
    if not large or limit == NO_LIMIT or _get64(counters, EXPANDABLE):
        return False
    wanted = max(size, limit)
    block = _similar_find(memory, wanted, large)
    if block >= 0:
        _release(memory, block)
        return True
    have = 0
    while have < wanted:  # the largest first
        largest, block = NONE, _similar_find(memory, limit, large)
        while block >= 0:
            largest, block = block, _similar_after(memory, block, large)
        if largest < 0:
            break
        have += _get32(records, largest + SIZE)
        _release(memory, largest)
    return have >= wanted


@_compiled
def _from_driver(memory: tuple[int, ...], growth: int, size: int, large: int) -> int:
    """Ask the driver, release idle memory and ask again; returns an idle, listed block or NONE when out of memory."""
    block = _ask_driver(memory, growth, size, large)
    if block < 0 and _release_for(memory, size, large):
        block = _ask_driver(memory, growth, size, large)
    if block < 0:
        _empty_cache(memory)
        block = _ask_driver(memory, growth, size, large)
    return block


# -- requests --------------------------------------------------------------------------------------------------------


@_inlined
def _room(records: int, block: int) -> int:
    size, after = _get32(records, block + SIZE), _get32(records, block + NEXT)
    if after >= 0 and _get32(records, after + STATE) & UNMAPPED:
        size += _get32(records, after + SIZE)
    return size


@_inlined
def _best_fit(memory: tuple[int, ...], size: int, large: int) -> int:
    """Return the block for a request of the large pool or an expandable segment, or NONE."""
    records, counters = memory[0], memory[4]
    block = _similar_find(memory, size, large)
    if block < 0:
        return NONE
    if _get64(counters, EXPANDABLE):
        # The last block of a growing segment counts with the room it can grow into, so others come first.
        after = _similar_after(memory, block, large)
        while after >= 0 and _room(records, after) < _room(records, block):
            block, after = after, _similar_after(memory, after, large)
    limit, found = _get64(counters, MAX_SPLIT), _get32(records, block + SIZE)
    if size < limit:
        return NONE if found >= limit else block
    return NONE if found >= size + _get64(counters, NON_SPLIT_ROUNDING) else block


@_inlined
def _malloc(memory: tuple[int, ...], growth: int, size: int, owner: int) -> int:
    """Give ``size`` units a block; returns NONE when out of memory."""
    records, lists, bitmaps, _, counters = memory
    large = LARGE if size > SMALL_LIMIT else 0
    if size <= SMALL_LIMIT and not _get64(counters, EXPANDABLE):
        which = _next_class(bitmaps, size - 1)
        block = _get32(lists, which * 4) if which >= 0 else NONE
        if block < 0:
            block = _from_driver(memory, growth, size, large)
            if block < 0:
                return NONE
        found = _get32(records, block + SIZE)
        _list_remove(records, lists, bitmaps, found - 1, block)
        if found > size:
            _list_add(records, lists, bitmaps, found - size - 1, _cut(memory, block, size, IDLE))
        _set32(records, block + STATE, owner << OWNER_SHIFT)
        _set64(counters, ALLOCATED_SMALL, _get64(counters, ALLOCATED_SMALL) + size)
    else:
        block = _best_fit(memory, size, large)
        if block < 0:
            block = _from_driver(memory, growth, size, large)
            if block < 0:
                return NONE
        _idle_remove(memory, block)
        rest = _get32(records, block + SIZE) - size
        if _get64(counters, EXPANDABLE):
            is_split = rest > 0
        else:
            is_split = rest > SMALL_LIMIT and size < _get64(counters, MAX_SPLIT)
        if is_split:
            _idle_add(memory, _cut(memory, block, size, IDLE | large))
        else:
            size += rest
        _set32(records, block + STATE, large | (owner << OWNER_SHIFT))
        if not large:
            _set64(counters, ALLOCATED_SMALL, _get64(counters, ALLOCATED_SMALL) + size)
    allocated = _get64(counters, ALLOCATED) + size
    _set64(counters, ALLOCATED, allocated)
    if allocated > _get64(counters, PEAK):
        _set64(counters, PEAK, allocated)
        _set64(counters, PEAK_SMALL, _get64(counters, ALLOCATED_SMALL))
    return block


@_compiled
def _round_units(n_bytes: int, divisions: Any) -> int:
    """Round a request as AllocatorSettings.round_size does, in units; ``divisions``: 16 numbers."""
    if n_bytes < 512:
        return 1
    top = 0
    while (n_bytes >> top) > 1:
        top += 1
    parts = divisions[min(max(top - 20, 0), 15)]
    if parts > 1 and n_bytes > 512 * parts:
        step = (1 << top) // parts
        n_bytes = (n_bytes + step - 1) // step * step
    return (n_bytes + 511) >> 9


@_compiled
def _has_room(counters: int, slots: int) -> bool:
    """Whether records and growths suffice for whatever a row of ``slots`` allocations may do.

    An allocation makes at most three records (address space, what stays unmapped, what stays idle) and, without
    expandable segments, one growth. With them empty_cache() cuts an idle block in up to three, and mapping the pages
    again is one growth a hole: both can happen to every block there is.
    """
    used = _get64(counters, RECORDS_USED)
    needed = 4 * slots + 64
    if _get64(counters, EXPANDABLE):
        needed += 2 * (used + needed)
    return used + needed <= _get64(counters, RECORD_CAPACITY) and _get64(counters, GROWTHS) + needed <= _get64(
        counters, GROWTH_CAPACITY
    )


@_compiled
def _begin_turn(counters: int, turn: int, carried: Any, next_carried: Any, first: Any) -> None:
    """Take over what the last turn carries, and forget its first row."""
    _set64(counters, TURN, turn)
    for i in range(len(carried)):
        carried[i], next_carried[i] = next_carried[i], NONE
    for i in range(len(first)):
        first[i] = NONE


@_compiled
def _compute_sizes(units: int, uses: Any, sizes: Any, divisions: Any, context: int, tokens: int) -> None:
    """Write the rounded sizes of one row, in units, for the rows of ``sizes`` that its section uses."""
    for k in uses:
        n_bytes = (
            sizes[k, 0]
            + sizes[k, 1] * context
            + sizes[k, 2] * tokens
            + sizes[k, 3] * tokens * tokens
            + sizes[k, 4] * tokens * context
        )
        _set64(units, k * 8, _round_units(n_bytes, divisions))


@_compiled
def _is_last_that_carries(schedule: Any, row: int, carried_start: Any) -> bool:
    """Whether the next row belongs to another turn, or to a section that carries nothing."""
    if row + 1 == len(schedule) or schedule[row + 1, 0] != schedule[row, 0]:
        return True
    after = schedule[row + 1, 1]
    return bool(carried_start[after + 1] == carried_start[after])


@_compiled
def _carry_over(next_carried: Any, slots: Any, lane: int) -> None:
    """Remember the blocks in these slots of a row for the next turn."""
    for i in range(len(next_carried)):
        next_carried[i] = NONE
    for i in range(len(slots)):
        next_carried[i] = _get32(lane, slots[i] * 4)


@_compiled
def _report(counters: int, digest: Any, owners: Any, out: Any, out_owners: Any) -> None:
    """Write the results of a row, in units; the columns are those that ``_replay`` of glmlab.allocator.replay reads."""
    small = _get64(counters, ALLOCATED_SMALL)
    out[0] = _get64(counters, RESERVED)
    out[1] = _get64(counters, ALLOCATED)
    out[2] = _get64(counters, PEAK)
    out[3] = _get64(counters, PEAK_SMALL)
    out[4] = _get64(counters, RESERVED_SMALL) - small
    out[5] = _get64(counters, RESERVED) - _get64(counters, ALLOCATED) - out[4]
    out[6] = _get64(counters, RESERVED_SMALL)
    out[7] = digest
    for i in range(len(owners)):
        out_owners[i] = owners[i]


@_entry
def replay_rows(
    memory: tuple[int, ...],
    growth: int,
    codes: int,
    ring: int,
    units: int,
    section_start: Any,
    section_slots: Any,
    uses: Any,
    uses_start: Any,
    sizes: Any,
    divisions: Any,
    first: Any,
    carried: Any,
    next_carried: Any,
    carried_slots: Any,
    carried_start: Any,
    lane_slots: Any,
    owners: Any,
    schedule: Any,
    begin_row: int,
    wants_hash: bool,
    out: Any,
    out_owners: Any,
) -> tuple[int, int]:
    """Replay rows of a schedule from ``begin_row`` on; returns the row where it stopped and why (DONE ...).

    Pointers
        ``memory``, see above; ``growth``: int64 (row, event, units, pool) a growth; ``codes``: an int32 an event, as
        ``StepReplayer`` encodes it; ``ring``: int32 blocks of the last LANES rows by slot; ``units``: int64 rounded
        size of every row of ``sizes``.

    Arrays (int64)
        The program: ``section_start``, ``section_slots`` (allocations a section), ``sizes`` (sizes, 5), and as ragged
        lists by section ``uses`` (rows of ``sizes``) and ``carried_slots``; ``divisions`` (16,). The state between
        rows: blocks of ``first`` (the turn's first row), ``carried`` and ``next_carried``, ``lane_slots`` (slots filled
        in each lane of the ring), ``owners`` (units allocated by each). The results: ``out`` (rows, 8), ``out_owners``
        (rows, owners).
    """
    records, counters = memory[0], memory[4]
    lane_size = len(first)
    rows = len(schedule)
    for row in range(begin_row, rows):
        turn, section, context, tokens = schedule[row, 0], schedule[row, 1], schedule[row, 2], schedule[row, 3]
        slots = section_slots[section]
        if not _has_room(counters, slots):
            return row, NEEDS_ROOM
        is_first = turn != _get64(counters, TURN)
        if is_first:
            _begin_turn(counters, turn, carried, next_carried, first)
        own_uses = uses[uses_start[section] : uses_start[section + 1]]
        _compute_sizes(units, own_uses, sizes, divisions, context, tokens)
        _set64(counters, ROW, row)
        _set64(counters, PEAK, _get64(counters, ALLOCATED))
        _set64(counters, PEAK_SMALL, _get64(counters, ALLOCATED_SMALL))
        lane = (row & (LANES - 1)) * lane_size
        slot = 0
        digest = np.uint64(0)
        for event in range(section_start[section], section_start[section + 1]):
            code = _get32(codes, event * 4)
            if code < 0:
                code = -1 - code
                owner = code & ((1 << OWNER_BITS) - 1)
                size = _get64(units, (code >> OWNER_BITS) * 8)
                _set64(counters, EVENT, event)
                block = _malloc(memory, growth, size, owner)
                if block < 0:
                    _set64(counters, FAILED_SIZE, size)
                    return row, OUT_OF_MEMORY
                _set32(ring, (lane + slot) * 4, block)
                if is_first:
                    first[slot] = block
                slot += 1
                owners[owner] += _get32(records, block + SIZE)
                if wants_hash:
                    address = np.uint64(_get32(records, block + ADDRESS))
                    digest = (digest ^ address) * np.uint64(1099511628211) + np.uint64(1)
                continue
            if code < CODE_FIRST:
                place = (((row - (code >> CODE_AGE_SHIFT)) & (LANES - 1)) * lane_size + (code & CODE_SLOT_MASK)) * 4
                block = _get32(ring, place)
                _set32(ring, place, NONE)
            elif code < CODE_CARRIED:
                block = first[code & CODE_SLOT_MASK]
                first[code & CODE_SLOT_MASK] = NONE
            elif code < CODE_EMPTY_CACHE:
                which = code & CODE_SLOT_MASK
                block = carried[which] if which < len(carried) else NONE
                if block >= 0:
                    carried[which] = NONE
            else:
                _empty_cache(memory)
                continue
            size = _get32(records, block + SIZE) if block >= 0 else 0
            owner = _free(memory, block) if block >= 0 else NONE
            if owner < 0:
                _set64(counters, EVENT, event)
                return row, BAD_FREE
            owners[owner] -= size
        lane_index = row & (LANES - 1)
        for i in range(slot, lane_slots[lane_index]):
            _set32(ring, (lane + i) * 4, NONE)
        lane_slots[lane_index] = slot
        own_carried = carried_slots[carried_start[section] : carried_start[section + 1]]
        if len(own_carried) and _is_last_that_carries(schedule, row, carried_start):
            _carry_over(next_carried, own_carried, ring + lane * 4)
        _report(counters, np.int64(digest), owners, out[row], out_owners[row])
    return rows, DONE
