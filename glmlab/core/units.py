"""Bytes and their names: MiB = 2**20 bytes and GiB = 2**30 bytes, never MB or GB."""

MIB = 2**20
GIB = 2**30


def mib(n_bytes: float) -> float:
    """Bytes as MiB.

    Example:
        >>> mib(3 * 1048576)
        3.0
    """
    return n_bytes / MIB


def format_bytes(n_bytes: float) -> str:
    """Bytes for a reader: GiB from 1 GiB on, MiB from 1 MiB on, KiB from 1 KiB on, else B.

    Example:
        >>> format_bytes(12_487_168_000), format_bytes(4_922_752), format_bytes(28_672), format_bytes(512)
        ('11.63 GiB', '4.69 MiB', '28.00 KiB', '512 B')
    """
    for unit_bytes, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if abs(n_bytes) >= unit_bytes:
            return f"{n_bytes / unit_bytes:.2f} {name}"
    return f"{n_bytes:.0f} B"
