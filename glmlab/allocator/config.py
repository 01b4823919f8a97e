"""Constants and settings of PyTorch's CUDA caching allocator: how a request rounds, how large a segment is."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB, format_bytes

BLOCK_BYTES = 512  # sizes and addresses are multiples of it
SMALL_REQUEST_BYTES = MIB  # largest request of the small pool, and largest rest that the large pool does not split off
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
LARGE_REQUEST_BYTES = 10 * MIB  # from here on a request gets a segment of its own size
SEGMENT_STEP_BYTES = 2 * MIB  # ... rounded up to this
FIRST_ADDRESS = 1 << 40
EXPANDABLE_SPACE_BYTES = 1 << 39  # address space of an expandable segment where the card is not known; never full
POWER2_INTERVALS = 16  # roundup_power2_divisions: one number for each power of two from 1 MiB to 32 GiB
DEFAULT_POOL = (0, 0)


class AllocatorError(GlmlabError):
    """A request, a setting or a seed that the allocator refuses."""


class OutOfMemory(GlmlabError):  # noqa: N818 - a forecast, not an error of this process
    """The driver has no memory for another segment, even after inactive ones were released; all figures in bytes."""

    def __init__(self, *, tried: int, capacity: int, outside: int, allocated: int, reserved: int) -> None:
        self.tried, self.capacity, self.allocated, self.reserved = tried, capacity, allocated, reserved
        self.free = max(capacity - outside - reserved, 0)
        super().__init__(
            f"CUDA out of memory. Tried to allocate {format_bytes(tried)}. GPU 0 has a total capacity of "
            f"{format_bytes(capacity)} of which {format_bytes(self.free)} is free. Of the allocated memory "
            f"{format_bytes(allocated)} is allocated by PyTorch, and {format_bytes(reserved - allocated)} is reserved "
            "by PyTorch but unallocated."
        )


@dataclass(frozen=True)
class AllocatorSettings:
    """What ``PYTORCH_CUDA_ALLOC_CONF`` can change, under its names (where "mb" is MiB); the defaults are PyTorch's.

    ``roundup_power2_divisions`` is one number for all sizes or a mapping from MiB (a power of two, 1 to 32768) to the
    divisions from there up to the next one named; 0 means none.

    Raises:
        AllocatorError: a size or a number of divisions that PyTorch refuses, too.

    Example:
        >>> AllocatorSettings().round_size(1_300_000)
        1300480
        >>> AllocatorSettings(roundup_power2_divisions=4).round_size(1_300_000)
        1310720
    """

    max_split_size_mb: int | None = None
    roundup_power2_divisions: int | Mapping[int, int] = 0
    expandable_segments: bool = False
    max_non_split_rounding_mb: int = 20
    large_segment_size_mb: int = 20

    def __post_init__(self) -> None:
        if self.max_split_size_mb is not None and self.max_split_size_mb <= LARGE_SEGMENT_BYTES // MIB:
            raise AllocatorError(
                f"max_split_size_mb must be over 20, is {self.max_split_size_mb}; leave it out to split all blocks"
            )
        if self.large_segment_size_mb < LARGE_REQUEST_BYTES // MIB:
            raise AllocatorError(
                f"large_segment_size_mb must be 10 or over, is {self.large_segment_size_mb}: such a segment serves "
                "requests of up to 10 MiB"
            )
        if self.max_non_split_rounding_mb < 0:
            raise AllocatorError(f"max_non_split_rounding_mb must not be negative, is {self.max_non_split_rounding_mb}")
        if isinstance(self.roundup_power2_divisions, Mapping):
            known = {1 << i for i in range(POWER2_INTERVALS)}
            if unknown := sorted(set(self.roundup_power2_divisions) - known):
                raise AllocatorError(
                    f"roundup_power2_divisions names {unknown[0]} MiB; it can name powers of two from 1 to {max(known)}"
                )
        if any(d < 0 or d & (d - 1) for d in self.power2_divisions):
            raise AllocatorError(f"roundup_power2_divisions must be powers of two, is {self.roundup_power2_divisions}")

    @property
    def max_split_bytes(self) -> int:
        """Blocks of this size and over are never split."""
        return (1 << 62) if self.max_split_size_mb is None else self.max_split_size_mb * MIB

    @cached_property
    def power2_divisions(self) -> tuple[int, ...]:
        """Divisions for each of the 16 powers of two from 1 MiB on."""
        named = self.roundup_power2_divisions
        if isinstance(named, int):
            return (named,) * POWER2_INTERVALS
        divisions = 0
        return tuple(divisions := named.get(1 << i, divisions) for i in range(POWER2_INTERVALS))

    def round_size(self, n_bytes: int) -> int:
        """Round a request up to the bytes that it asks a block for."""
        if n_bytes < BLOCK_BYTES:
            return BLOCK_BYTES
        interval = min(max(n_bytes.bit_length() - MIB.bit_length(), 0), POWER2_INTERVALS - 1)
        divisions = self.power2_divisions[interval]
        if divisions > 1 and n_bytes > BLOCK_BYTES * divisions:
            return round_up(n_bytes, (1 << (n_bytes.bit_length() - 1)) // divisions)
        return round_up(n_bytes, BLOCK_BYTES)

    def segment_bytes(self, size: int) -> int:
        """Bytes asked of the driver for a rounded request (without expandable segments)."""
        if size < LARGE_REQUEST_BYTES:
            return self.page_bytes(size <= SMALL_REQUEST_BYTES)
        return round_up(size, SEGMENT_STEP_BYTES)

    def page_bytes(self, is_small: bool) -> int:
        """Bytes that an expandable segment grows by."""
        return SMALL_SEGMENT_BYTES if is_small else self.large_segment_size_mb * MIB


def round_up(n_bytes: int, step: int) -> int:
    """Return the next multiple of ``step``."""
    return -(-n_bytes // step) * step


class Addresses:
    """Where the driver puts what it gives: rising addresses or, with a ``seed``, each above or below all others.

    Nobody can know the driver's choice; a few seeds show what depends on it.

    Raises:
        AllocatorError: a negative seed.

    Example:
        >>> rising = Addresses()
        >>> rising.take(512) - FIRST_ADDRESS, rising.take(512) - FIRST_ADDRESS
        (0, 512)
        >>> drawn = Addresses(seed=3)
        >>> [drawn.take(512) - FIRST_ADDRESS for _ in range(4)]
        [0, -512, -1024, 512]
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise AllocatorError(f"address_seed={seed}: seeds start at 0. Leave it out for rising addresses.")
        self.seed = seed
        self._lowest = self._top = FIRST_ADDRESS
        self._taken = 0

    def take(self, n_bytes: int) -> int:
        """Return the first address of a new range."""
        self._taken += 1
        if self.seed is not None and self._coin(self.seed):
            self._lowest -= n_bytes
            return self._lowest
        self._top += n_bytes
        return self._top - n_bytes

    def _coin(self, seed: int) -> int:
        """Toss the coin of this range (splitmix64, as in the compiled allocator)."""
        mask = (1 << 64) - 1
        x = (seed * 0xD1342543DE82EF95 + self._taken * 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x >> 63
