"""Where the driver puts what it gives: no replay can know, so rising addresses, or an order drawn from a seed."""

from glmlab.allocator.config import FIRST_ADDRESS, AllocatorError


class Addresses:
    """Address ranges one beside the other: rising, or with a ``seed`` each above or below all others, by chance.

    Example:
        >>> rising = Addresses()
        >>> rising.take(512) - FIRST_ADDRESS, rising.take(512) - FIRST_ADDRESS
        (0, 512)
        >>> drawn = Addresses(seed=3)
        >>> [drawn.take(512) - FIRST_ADDRESS for _ in range(4)]
        [0, -512, -1024, 512]
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = checked_seed(seed)
        self._lowest = self._top = FIRST_ADDRESS
        self._taken = 0

    def take(self, n_bytes: int) -> int:
        """Return the first address of a new range."""
        goes_below = self._seed is not None and coin(self._seed, self._taken)
        self._taken += 1
        if goes_below:
            self._lowest -= n_bytes
            return self._lowest
        self._top += n_bytes
        return self._top - n_bytes


def checked_seed(seed: int | None) -> int | None:
    """Return the seed; :class:`AllocatorError` for a negative one, which the compiled replay has no place for."""
    if seed is not None and seed < 0:
        raise AllocatorError(f"address_seed={seed}: seeds start at 0. Leave it out for rising addresses.")
    return seed


def coin(seed: int, index: int) -> bool:
    """Toss coin number ``index`` of a seed (splitmix64, the same in every form of the allocator)."""
    mask = (1 << 64) - 1
    x = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return bool(x >> 63)
