"""The caching allocator and the replay of event programs, compiled: about ten nanoseconds an event.

The rules are those of :mod:`glmlab.allocator.caching`, and tests compare both forms. What makes this one fast:

- Sizes and addresses count units of 512 B and fit 32 bits; a block is a record of seven numbers, named by its offset.
- Inactive blocks of the small pool hang in 4,096 lists, one for each size, ordered by address. A bitmap with a summary
  word finds the best fit in two find-first-set instructions.
- Inactive blocks of the large pool hang in lists of similar sizes (64 between two powers of two), ordered by size, then
  address. With expandable segments those of the small pool do too, because they can have any size.
- Memory is read through raw pointers (numba's arrays carry seven numbers each, which would fill the registers), and
  whatever an event runs is inlined into one kernel. There are no bounds checks: the caller checks the program, and the
  kernel stops before a row that might need more records than are left.

All kernels are in this file, because numba's disk cache misses edits in imported files.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# Fields of a block record, as byte offsets; NONE instead of an offset: no block.
ADDRESS, SIZE, PREV, NEXT, STATE, LIST_PREV, LIST_NEXT, RECORD_BYTES = 0, 4, 8, 12, 16, 20, 24, 32
NONE = -1
# Bits of STATE; live blocks have neither INACTIVE nor UNMAPPED.
INACTIVE, LARGE, UNMAPPED, OWNER_SHIFT, OWNER_BITS = 1, 2, 4, 3, 5

# Counters and settings, as byte offsets; sizes in units.
RESERVED, ALLOCATED, PEAK, PEAK_SMALL, ALLOCATED_SMALL, RESERVED_SMALL = range(0, 48, 8)
TOP, LOWEST, SEGMENTS_MADE, RECORDS_USED, SPACE_SMALL, SPACE_LARGE = range(48, 96, 8)
CAPACITY, SEED, EXPANDABLE, MAX_SPLIT, NON_SPLIT_ROUNDING, LARGE_SEGMENT = range(96, 144, 8)
ROW, EVENT, GROWTHS, GROWTH_CAPACITY, RECORD_CAPACITY, FAILED_SIZE, TURN, ROWS_BEFORE = range(144, 208, 8)
LANE_SLOTS, COUNTERS = 208, 30  # slots filled in each of the first four lanes
NO_SEED, NO_LIMIT = -1, 1 << 40

SMALL_LIMIT, SMALL_SEGMENT, LARGE_LIMIT = 2048, 4096, 20480  # units: 1 MiB, 2 MiB, 10 MiB
EXPANDABLE_SPACE = 1 << 30
# Lists of inactive blocks, in three groups of 4,096: exact sizes of the small pool, similar sizes of the small pool,
# similar sizes of the large pool. The bitmap of a group has 64 words and a summary of them.
EXACT, SIMILAR_SMALL, SIMILAR_LARGE = range(3)
GROUP_LISTS, GROUP_WORDS, SUMMARY = 4096, 65, 64

# Blocks that later events may free, in lanes of slots: the last four rows, the first row of the turn, what the previous
# turn carried over, and what this turn carries over if it ends now.
RECENT, FIRST, CARRIED, NEXT_CARRIED, LANES = 4, 4, 5, 6, 7
# An event as one int32: below 0 an allocation (row of ``sizes`` and owner), else lane and slot of the block to free,
# where the lanes of recent rows count backwards; or EMPTY_CACHE in place of the lane.
LANE_SHIFT, SLOT_MASK, EMPTY_CACHE = 20, (1 << 20) - 1, 7
DONE, NEEDS_ROOM, OUT_OF_MEMORY, BAD_FREE = range(4)


class Memory(NamedTuple):
    """Addresses of the arrays that the kernels read and write without numba."""

    records: int  # RECORD_BYTES for each block
    spare: int  # int32: offsets of records; those from RECORDS_USED on are not in use
    lists: int  # int32: first block of each list of inactive blocks
    bitmap: int  # int64: which lists are not empty, and which words are not 0
    counters: int  # int64
    growth: int  # int64 (row, event, units, pool) for each segment or mapped range
    codes: int  # int32 for each event of the program
    units: int  # int64: rounded size of each row of ``sizes``
    lanes: int  # int32: blocks, by lane and slot
    owners: int  # int64: units allocated by each owner


class Tables(NamedTuple):
    """The program and its settings, as int64 arrays."""

    section_start: Any  # (sections + 1,)
    section_slots: Any  # (sections,) allocations of each
    sizes: Any  # (sizes, 5)
    divisions: Any  # (16,) of roundup_power2_divisions
    carried_start: Any  # (sections + 1,) where the section's slots stand in carried_slots
    carried_slots: Any
    lane_size: Any  # (1,)


def _jit(**options: Any) -> Callable[[F], F]:
    decorator: Callable[[F], F] = numba.njit(error_model="numpy", boundscheck=False, **options)
    return decorator


_compiled, _inlined = _jit(), _jit(forceinline=True)
_entry = _jit(cache=True)  # the cache on disk holds everything that the function calls, too


def _memory_access(bits: int) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
    """Return functions that read and write a signed number at an address plus an offset."""
    kind = ir.IntType(bits)

    def pointer(builder: Any, args: Any) -> Any:
        return builder.inttoptr(builder.add(args[0], args[1]), kind.as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]
    def load(_context: Any, base: Any, offset: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            value = builder.load(pointer(builder, args))
            return value if bits == 64 else builder.sext(value, ir.IntType(64))

        return types.int64(types.int64, types.int64), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def store(_context: Any, base: Any, offset: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            builder.store(args[2] if bits == 64 else builder.trunc(args[2], kind), pointer(builder, args))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return load, store


def _bit_finder(instruction: str) -> Callable[[int], int]:
    @intrinsic  # type: ignore[untyped-decorator]
    def find(_context: Any, word: Any) -> Any:
        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            return getattr(builder, instruction)(args[0], ir.Constant(ir.IntType(1), 0))

        return types.int64(types.int64), generate

    finder: Callable[[int], int] = find
    return finder


(_get32, _set32), (_get64, _set64) = _memory_access(32), _memory_access(64)
_zeros_below = _bit_finder("cttz")  # zero bits below the lowest bit set
_zeros_above = _bit_finder("ctlz")  # zero bits above the highest bit set


@_inlined
def _add64(base: int, offset: int, value: int) -> None:
    _set64(base, offset, _get64(base, offset) + value)


# -- lists of inactive blocks ------------------------------------------------------------------------------------------


@_inlined
def _similar(size: int) -> int:
    """Return the class of a size: exact below 64 units, then 64 classes for every power of two."""
    power = 63 - _zeros_above(size)
    return size if power < 6 else (power - 5) * 64 + ((size >> (power - 6)) & 63)


@_inlined
def _group(memory: Memory, large: int) -> int:
    """Return the group of lists for the blocks of a pool."""
    if large:
        return SIMILAR_LARGE
    return SIMILAR_SMALL if _get64(memory.counters, EXPANDABLE) else EXACT


@_inlined
def _number(group: int, size: int) -> int:
    """Return the list for a size, within its group."""
    return size - 1 if group == EXACT else _similar(size)


@_inlined
def _first(memory: Memory, group: int, number: int) -> int:
    """Return the first block of the first list that is not empty, from ``number`` on, or NONE."""
    bitmap = memory.bitmap + group * GROUP_WORDS * 8
    word = number >> 6
    bits = _get64(bitmap, word * 8) & (-1 << (number & 63))
    if bits == 0:
        words = _get64(bitmap, SUMMARY * 8) & (-2 << word)
        if words == 0:
            return NONE
        word = _zeros_below(words)
        bits = _get64(bitmap, word * 8)
    return _get32(memory.lists, (group * GROUP_LISTS + word * 64 + _zeros_below(bits)) * 4)


@_inlined
def _key(records: int, block: int) -> int:
    return (_get32(records, block + SIZE) << 32) + _get32(records, block + ADDRESS)


@_inlined
def _list_add(memory: Memory, group: int, block: int, size: int) -> None:
    """Put an inactive block at its place in the list of its size."""
    records, bitmap = memory.records, memory.bitmap + group * GROUP_WORDS * 8
    number = _number(group, size)
    head = (group * GROUP_LISTS + number) * 4
    key = _key(records, block)
    before, after = NONE, _get32(memory.lists, head)
    while after >= 0 and _key(records, after) < key:
        before, after = after, _get32(records, after + LIST_NEXT)
    _set32(records, block + LIST_PREV, before)
    _set32(records, block + LIST_NEXT, after)
    if after >= 0:
        _set32(records, after + LIST_PREV, block)
    if before >= 0:
        _set32(records, before + LIST_NEXT, block)
    else:
        _set32(memory.lists, head, block)
        if after < 0:
            word = number >> 6
            _set64(bitmap, word * 8, _get64(bitmap, word * 8) | (1 << (number & 63)))
            _set64(bitmap, SUMMARY * 8, _get64(bitmap, SUMMARY * 8) | (1 << word))


@_inlined
def _list_remove(memory: Memory, group: int, block: int, size: int) -> None:
    """Take an inactive block out of the list of its size."""
    records, bitmap = memory.records, memory.bitmap + group * GROUP_WORDS * 8
    before, after = _get32(records, block + LIST_PREV), _get32(records, block + LIST_NEXT)
    if after >= 0:
        _set32(records, after + LIST_PREV, before)
    if before >= 0:
        _set32(records, before + LIST_NEXT, after)
    else:
        number = _number(group, size)
        _set32(memory.lists, (group * GROUP_LISTS + number) * 4, after)
        if after < 0:
            word = number >> 6
            bits = _get64(bitmap, word * 8) & ~(1 << (number & 63))
            _set64(bitmap, word * 8, bits)
            if bits == 0:
                _set64(bitmap, SUMMARY * 8, _get64(bitmap, SUMMARY * 8) & ~(1 << word))


@_inlined
def _at_least(memory: Memory, group: int, size: int) -> int:
    """Return the smallest inactive block of at least ``size`` units in lists of similar sizes, or NONE."""
    number = _similar(size)
    block = _get32(memory.lists, (group * GROUP_LISTS + number) * 4)
    while block >= 0 and _get32(memory.records, block + SIZE) < size:
        block = _get32(memory.records, block + LIST_NEXT)
    return block if block >= 0 else _first(memory, group, number + 1)


@_inlined
def _after(memory: Memory, group: int, block: int) -> int:
    """Return the inactive block next in order of size and address, or NONE."""
    after = _get32(memory.records, block + LIST_NEXT)
    if after >= 0:
        return after
    return _first(memory, group, _similar(_get32(memory.records, block + SIZE)) + 1)


# -- blocks ------------------------------------------------------------------------------------------------------------


@_inlined
def _new_record(memory: Memory, address: int, size: int, state: int) -> int:
    records = memory.records
    block = _get32(memory.spare, _get64(memory.counters, RECORDS_USED) * 4)
    _add64(memory.counters, RECORDS_USED, 1)
    _set32(records, block + ADDRESS, address)
    _set32(records, block + SIZE, size)
    _set32(records, block + PREV, NONE)
    _set32(records, block + NEXT, NONE)
    _set32(records, block + STATE, state)
    return block


@_inlined
def _drop_record(memory: Memory, block: int) -> None:
    _add64(memory.counters, RECORDS_USED, -1)
    _set32(memory.spare, _get64(memory.counters, RECORDS_USED) * 4, block)


@_inlined
def _link(records: int, block: int, after: int) -> None:
    _set32(records, block + NEXT, after)
    if after >= 0:
        _set32(records, after + PREV, block)


@_inlined
def _cut(memory: Memory, block: int, size: int, state: int) -> int:
    """Cut a block behind ``size`` units; returns the new block behind the cut."""
    records = memory.records
    rest = _new_record(memory, _get32(records, block + ADDRESS) + size, _get32(records, block + SIZE) - size, state)
    _link(records, rest, _get32(records, block + NEXT))
    _link(records, block, rest)
    _set32(records, block + SIZE, size)
    return rest


@_inlined
def _absorb_next(memory: Memory, block: int) -> None:
    records = memory.records
    gone = _get32(records, block + NEXT)
    _set32(records, block + SIZE, _get32(records, block + SIZE) + _get32(records, gone + SIZE))
    _link(records, block, _get32(records, gone + NEXT))
    _drop_record(memory, gone)


@_inlined
def _coalesce(memory: Memory, group: int, block: int, size: int, state: int) -> int:
    """Join a block that is in no list with inactive neighbours and list it; ``state`` is its new one."""
    records = memory.records
    left = _get32(records, block + PREV)
    if left >= 0 and _get32(records, left + STATE) & INACTIVE:
        left_size = _get32(records, left + SIZE)
        _list_remove(memory, group, left, left_size)
        _absorb_next(memory, left)
        block, size = left, size + left_size
    right = _get32(records, block + NEXT)
    if right >= 0 and _get32(records, right + STATE) & INACTIVE:
        right_size = _get32(records, right + SIZE)
        _list_remove(memory, group, right, right_size)
        _absorb_next(memory, block)
        size += right_size
    _set32(records, block + STATE, state)
    _list_add(memory, group, block, size)
    return block


@_inlined
def _free(memory: Memory, block: int) -> int:
    """Free a live block; returns its owner, or NONE where it is not live."""
    state, size = _get32(memory.records, block + STATE), _get32(memory.records, block + SIZE)
    if state & (INACTIVE | UNMAPPED):
        return NONE
    _add64(memory.counters, ALLOCATED, -size)
    if not state & LARGE:
        _add64(memory.counters, ALLOCATED_SMALL, -size)
    group = _group(memory, state & LARGE)
    if group == EXACT:
        _coalesce(memory, EXACT, block, size, INACTIVE)
    else:
        _coalesce(memory, group, block, size, (state & LARGE) | INACTIVE)
    return state >> OWNER_SHIFT


# -- the driver: rare, so not inlined ----------------------------------------------------------------------------------


@_compiled
def _next_address(counters: int, size: int) -> int:
    made, seed = _get64(counters, SEGMENTS_MADE), _get64(counters, SEED)
    _set64(counters, SEGMENTS_MADE, made + 1)
    if seed != NO_SEED:
        # The coin of Addresses in glmlab.allocator.config; unsigned, because signed products must not wrap in LLVM.
        x = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(made + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        if x >> np.uint64(63):
            _add64(counters, LOWEST, -size)
            return _get64(counters, LOWEST)
    _add64(counters, TOP, size)
    return _get64(counters, TOP) - size


@_compiled
def _grow(memory: Memory, state: int, size: int) -> bool:
    """Count ``size`` units from the driver, if it has them."""
    counters = memory.counters
    if _get64(counters, RESERVED) + size > _get64(counters, CAPACITY):
        return False
    _add64(counters, RESERVED, size)
    if not state & LARGE:
        _add64(counters, RESERVED_SMALL, size)
    entry = memory.growth + _get64(counters, GROWTHS) * 32
    _add64(counters, GROWTHS, 1)
    _set64(entry, 0, _get64(counters, ROW))
    _set64(entry, 8, _get64(counters, EVENT))
    _set64(entry, 16, size)
    _set64(entry, 24, 1 if state & LARGE else 0)
    return True


@_compiled
def _shrink(memory: Memory, state: int, size: int) -> None:
    _add64(memory.counters, RESERVED, -size)
    if not state & LARGE:
        _add64(memory.counters, RESERVED_SMALL, -size)


@_compiled
def _page(counters: int, large: int) -> int:
    return _get64(counters, LARGE_SEGMENT) if large else SMALL_SEGMENT


@_compiled
def _map(memory: Memory, hole: int, size: int) -> int:
    """Map the front of a hole; returns the inactive block it becomes part of, or NONE without memory."""
    state = _get32(memory.records, hole + STATE)
    if not _grow(memory, state, size):
        return NONE
    if size < _get32(memory.records, hole + SIZE):
        _cut(memory, hole, size, state)
    return _coalesce(memory, _group(memory, state & LARGE), hole, size, (state & LARGE) | INACTIVE)


@_compiled
def _room_from(memory: Memory, start: int, size: int) -> int:
    """Return the bytes, in units, of the blocks that are not live from ``start`` on, counted up to ``size``."""
    have = 0
    while start >= 0 and have < size and _get32(memory.records, start + STATE) & (INACTIVE | UNMAPPED):
        have += _get32(memory.records, start + SIZE)
        start = _get32(memory.records, start + NEXT)
    return have


@_compiled
def _expand(memory: Memory, size: int, large: int) -> int:
    """Map what an expandable segment lacks for a request; returns the inactive block, or NONE without memory."""
    records, counters = memory.records, memory.counters
    space = SPACE_LARGE if large else SPACE_SMALL
    if _get64(counters, space) == NONE:
        address = _next_address(counters, EXPANDABLE_SPACE)
        _set64(counters, space, _new_record(memory, address, EXPANDABLE_SPACE, UNMAPPED | large))
    hole = block = _get64(counters, space)
    while hole >= 0:  # the lowest hole that has the room, with the inactive block before it
        if _get32(records, hole + STATE) & UNMAPPED:
            before = _get32(records, hole + PREV)
            block = before if before >= 0 and _get32(records, before + STATE) & INACTIVE else hole
            if _room_from(memory, block, size) >= size:
                break
        hole = _get32(records, hole + NEXT)
    if hole < 0:
        return NONE
    have, page = 0, _page(counters, large)
    while have < size:
        if have > 0:
            block = _get32(records, block + NEXT)
        if _get32(records, block + STATE) & UNMAPPED:
            lacks = min(size - have, _get32(records, block + SIZE))
            block = _map(memory, block, (lacks + page - 1) // page * page)
            if block < 0:
                return NONE
        have = _get32(records, block + SIZE)
    return block


@_compiled
def _ask_driver(memory: Memory, size: int, large: int) -> int:
    """Return a listed inactive block from the driver, or NONE without memory."""
    if _get64(memory.counters, EXPANDABLE):
        return _expand(memory, size, large)
    if size < LARGE_LIMIT:
        segment = _page(memory.counters, large)
    else:
        segment = (size + SMALL_SEGMENT - 1) // SMALL_SEGMENT * SMALL_SEGMENT
    if not _grow(memory, large, segment):
        return NONE
    block = _new_record(memory, _next_address(memory.counters, segment), segment, INACTIVE | large)
    _list_add(memory, _group(memory, large), block, segment)
    return block


@_compiled
def _release(memory: Memory, block: int) -> None:
    """Give a whole inactive segment back to the driver."""
    state, size = _get32(memory.records, block + STATE), _get32(memory.records, block + SIZE)
    _list_remove(memory, _group(memory, state & LARGE), block, size)
    _shrink(memory, state, size)
    _drop_record(memory, block)


@_compiled
def _unmap(memory: Memory, block: int) -> None:
    """Give the whole pages of an inactive block of an expandable segment back to the driver."""
    records = memory.records
    state, size = _get32(records, block + STATE), _get32(records, block + SIZE)
    page, group = _page(memory.counters, state & LARGE), _group(memory, state & LARGE)
    space = _get64(memory.counters, SPACE_LARGE if state & LARGE else SPACE_SMALL)
    offset = _get32(records, block + ADDRESS) - _get32(records, space + ADDRESS)
    begin, end = (offset + page - 1) // page * page, (offset + size) // page * page
    if begin >= end:
        return
    _list_remove(memory, group, block, size)
    if begin > offset:
        rest = _cut(memory, block, begin - offset, state)
        _list_add(memory, group, block, begin - offset)
        block = rest
    if end < offset + size:
        _list_add(memory, group, _cut(memory, block, end - begin, state), offset + size - end)
    _shrink(memory, state, end - begin)
    _set32(records, block + STATE, (state & LARGE) | UNMAPPED)
    right = _get32(records, block + NEXT)
    if right >= 0 and _get32(records, right + STATE) & UNMAPPED:
        _absorb_next(memory, block)
    left = _get32(records, block + PREV)
    if left >= 0 and _get32(records, left + STATE) & UNMAPPED:
        _absorb_next(memory, left)


@_compiled
def _empty_cache(memory: Memory) -> None:
    records = memory.records
    if _get64(memory.counters, EXPANDABLE):
        for space in (SPACE_LARGE, SPACE_SMALL):
            block = _get64(memory.counters, space)
            while block >= 0:
                if _get32(records, block + STATE) & INACTIVE:
                    _unmap(memory, block)
                block = _get32(records, block + NEXT)
        return
    block = _at_least(memory, SIMILAR_LARGE, 1)
    while block >= 0:
        after = _after(memory, SIMILAR_LARGE, block)
        if _get32(records, block + PREV) < 0 and _get32(records, block + NEXT) < 0:
            _release(memory, block)
        block = after
    block = _get32(memory.lists, (SMALL_SEGMENT - 1) * 4)
    while block >= 0:  # an inactive block of the small pool that is as large as a segment is one
        after = _get32(records, block + LIST_NEXT)
        _release(memory, block)
        block = after


@_compiled
def _release_for(memory: Memory, size: int, large: int) -> bool:
    """Release oversize blocks for a request of the large pool, if splitting is limited; says whether they suffice."""
    limit = _get64(memory.counters, MAX_SPLIT)
    if not large or limit == NO_LIMIT or _get64(memory.counters, EXPANDABLE):
        return False
    wanted = max(size, limit)
    block = _at_least(memory, SIMILAR_LARGE, wanted)
    if block >= 0:
        _release(memory, block)
        return True
    have = 0
    while have < wanted:  # the largest first
        largest, block = NONE, _at_least(memory, SIMILAR_LARGE, limit)
        while block >= 0:
            largest, block = block, _after(memory, SIMILAR_LARGE, block)
        if largest < 0:
            break
        have += _get32(memory.records, largest + SIZE)
        _release(memory, largest)
    return have >= wanted


@_compiled
def _from_driver(memory: Memory, size: int, large: int) -> int:
    """Ask the driver, release inactive memory and ask again; returns a listed inactive block, or NONE."""
    block = _ask_driver(memory, size, large)
    if block < 0 and _release_for(memory, size, large):
        block = _ask_driver(memory, size, large)
    if block < 0:
        _empty_cache(memory)
        block = _ask_driver(memory, size, large)
    return block


# -- requests ----------------------------------------------------------------------------------------------------------


@_inlined
def _growable(records: int, block: int) -> int:
    """Return the size of a block with the hole behind it."""
    size, after = _get32(records, block + SIZE), _get32(records, block + NEXT)
    if after >= 0 and _get32(records, after + STATE) & UNMAPPED:
        size += _get32(records, after + SIZE)
    return size


@_inlined
def _best_fit(memory: Memory, group: int, size: int) -> int:
    """Return the inactive block for a request in lists of similar sizes, or NONE."""
    records, counters = memory.records, memory.counters
    block = _at_least(memory, group, size)
    if block < 0:
        return NONE
    if _get64(counters, EXPANDABLE):
        # The last block of a growing segment counts with what it can grow by, so others come first.
        after = _after(memory, group, block)
        while after >= 0 and _growable(records, after) < _growable(records, block):
            block, after = after, _after(memory, group, after)
    limit, found = _get64(counters, MAX_SPLIT), _get32(records, block + SIZE)
    if size < limit:
        return NONE if found >= limit else block
    return NONE if found >= size + _get64(counters, NON_SPLIT_ROUNDING) else block


@_inlined
def _malloc(memory: Memory, size: int, owner: int) -> int:
    """Give ``size`` units a block; returns NONE when out of memory."""
    records, counters = memory.records, memory.counters
    large = LARGE if size > SMALL_LIMIT else 0
    group = _group(memory, large)
    block = _first(memory, EXACT, size - 1) if group == EXACT else _best_fit(memory, group, size)
    if block < 0:
        block = _from_driver(memory, size, large)
        if block < 0:
            return NONE
    rest = _get32(records, block + SIZE) - size
    if group == EXACT:
        _list_remove(memory, EXACT, block, size + rest)
        if rest > 0:
            _list_add(memory, EXACT, _cut(memory, block, size, INACTIVE), rest)
    else:
        _list_remove(memory, group, block, size + rest)
        is_split = rest > SMALL_LIMIT and size < _get64(counters, MAX_SPLIT)
        if is_split or (rest > 0 and _get64(counters, EXPANDABLE)):
            _list_add(memory, group, _cut(memory, block, size, INACTIVE | large), rest)
        else:
            size += rest
    _set32(records, block + STATE, large | (owner << OWNER_SHIFT))
    if not large:
        _add64(counters, ALLOCATED_SMALL, size)
    allocated = _get64(counters, ALLOCATED) + size
    _set64(counters, ALLOCATED, allocated)
    if allocated > _get64(counters, PEAK):
        _set64(counters, PEAK, allocated)
        _set64(counters, PEAK_SMALL, _get64(counters, ALLOCATED_SMALL))
    return block


# -- rows of a schedule ------------------------------------------------------------------------------------------------


@_compiled
def _round_units(n_bytes: int, divisions: Any) -> int:
    """Round a request as AllocatorSettings.round_size does, in units."""
    if n_bytes < 512:
        return 1
    power = 63 - _zeros_above(n_bytes)
    parts = divisions[min(max(power - 20, 0), 15)]
    if parts > 1 and n_bytes > 512 * parts:
        step = (1 << power) // parts
        n_bytes = (n_bytes + step - 1) // step * step
    return (n_bytes + 511) >> 9


@_compiled
def _compute_sizes(units: int, tables: Tables, context: int, tokens: int) -> None:
    """Write the rounded sizes of one row of the schedule, in units."""
    sizes = tables.sizes
    for k in range(len(sizes)):
        n_bytes = sizes[k, 0] + sizes[k, 1] * context
        n_bytes += (sizes[k, 2] + sizes[k, 3] * tokens + sizes[k, 4] * context) * tokens
        _set64(units, k * 8, _round_units(n_bytes, tables.divisions))


@_compiled
def _has_room(counters: int, slots: int) -> bool:
    """Whether records and growths suffice for whatever a row of ``slots`` allocations may do.

    An allocation makes at most three records (address space, what stays unmapped, what stays inactive) and, without
    expandable segments, one growth. With them empty_cache() cuts an inactive block in up to three, and mapping the
    pages again is one growth a hole: both can happen to every block there is.
    """
    used = _get64(counters, RECORDS_USED)
    needed = 4 * slots + 64
    if _get64(counters, EXPANDABLE):
        needed += 2 * (used + needed)
    has_records = used + needed <= _get64(counters, RECORD_CAPACITY)
    return has_records and _get64(counters, GROWTHS) + needed <= _get64(counters, GROWTH_CAPACITY)


@_compiled
def _begin_turn(lanes: int, size: int) -> None:
    """Take over what the last turn carries, and forget its first row."""
    for slot in range(size):
        place = (NEXT_CARRIED * size + slot) * 4
        _set32(lanes, (CARRIED * size + slot) * 4, _get32(lanes, place))
        _set32(lanes, place, NONE)
        _set32(lanes, (FIRST * size + slot) * 4, NONE)


@_compiled
def _end_row(memory: Memory, tables: Tables, section: int, lane: int, slots: int) -> None:
    """Forget what an older row left in the lane, and remember what the turn carries over if it ends here."""
    lanes, size = memory.lanes, tables.lane_size[0]
    filled = LANE_SLOTS + lane * 8
    for slot in range(slots, _get64(memory.counters, filled)):
        _set32(lanes, (lane * size + slot) * 4, NONE)
    _set64(memory.counters, filled, slots)
    carried = tables.carried_slots[tables.carried_start[section] : tables.carried_start[section + 1]]
    if len(carried):
        for slot in range(size):
            _set32(lanes, (NEXT_CARRIED * size + slot) * 4, NONE)
        for i in range(len(carried)):
            block = _get32(lanes, (lane * size + carried[i]) * 4)
            _set32(lanes, (NEXT_CARRIED * size + i) * 4, block)


@_compiled
def _report(counters: int, out: Any) -> None:
    """Write the results of a row, in units; the columns are REPLAY_COLUMNS of glmlab.allocator.replay."""
    small = _get64(counters, ALLOCATED_SMALL)
    out[0] = _get64(counters, RESERVED)
    out[1] = _get64(counters, RESERVED_SMALL)
    out[2] = _get64(counters, ALLOCATED)
    out[3] = _get64(counters, PEAK)
    out[4] = _get64(counters, PEAK_SMALL)
    out[5] = out[1] - small
    out[6] = out[0] - out[2] - out[5]


@_entry
def run_schedule(
    pointers: tuple[int, ...], arrays: tuple[Any, ...], schedule: Any, begin_row: int, out: Any, out_owners: Any
) -> tuple[int, int]:
    """Replay rows of a schedule from ``begin_row`` on; returns the row where it stopped and why (DONE ...).

    ``pointers`` and ``arrays`` are the fields of Memory and Tables: plain tuples, because numba's cache of an older
    version cannot be read where it names a class that is gone. The results, in units: ``out`` (rows, 7) and
    ``out_owners`` (rows, owners).
    """
    memory, tables = Memory(*pointers), Tables(*arrays)
    records, counters, lanes, owners = memory.records, memory.counters, memory.lanes, memory.owners
    lane_size = tables.lane_size[0]
    rows_before = _get64(counters, ROWS_BEFORE)
    for row in range(begin_row, len(schedule)):
        turn, section, context, tokens = schedule[row, 0], schedule[row, 1], schedule[row, 2], schedule[row, 3]
        if not _has_room(counters, tables.section_slots[section]):
            return row, NEEDS_ROOM
        is_first = turn != _get64(counters, TURN)
        if is_first:
            _set64(counters, TURN, turn)
            _begin_turn(lanes, lane_size)
        _compute_sizes(memory.units, tables, context, tokens)
        _set64(counters, ROW, row)
        _set64(counters, PEAK, _get64(counters, ALLOCATED))
        _set64(counters, PEAK_SMALL, _get64(counters, ALLOCATED_SMALL))
        number = rows_before + row
        own_lane = number & (RECENT - 1)
        slot = 0
        for event in range(tables.section_start[section], tables.section_start[section + 1]):
            code = _get32(memory.codes, event * 4)
            if code < 0:
                owner = (-1 - code) & ((1 << OWNER_BITS) - 1)
                size = _get64(memory.units, ((-1 - code) >> OWNER_BITS) * 8)
                _set64(counters, EVENT, event)
                block = _malloc(memory, size, owner)
                if block < 0:
                    _set64(counters, FAILED_SIZE, size)
                    return row, OUT_OF_MEMORY
                _set32(lanes, (own_lane * lane_size + slot) * 4, block)
                if is_first:
                    _set32(lanes, (FIRST * lane_size + slot) * 4, block)
                slot += 1
                _add64(owners, owner * 8, _get32(records, block + SIZE))
                continue
            lane = code >> LANE_SHIFT
            if lane == EMPTY_CACHE:
                _empty_cache(memory)
                continue
            if lane < RECENT:
                lane = (number - lane) & (RECENT - 1)
            place = (lane * lane_size + (code & SLOT_MASK)) * 4
            block = _get32(lanes, place)
            _set32(lanes, place, NONE)
            size = _get32(records, block + SIZE) if block >= 0 else 0
            owner = _free(memory, block) if block >= 0 else NONE
            if owner < 0:
                _set64(counters, EVENT, event)
                return row, BAD_FREE
            _add64(owners, owner * 8, -size)
        _end_row(memory, tables, section, own_lane, slot)
        _report(counters, out[row])
        for i in range(out_owners.shape[1]):
            out_owners[row, i] = _get64(owners, i * 8)
    return len(schedule), DONE
