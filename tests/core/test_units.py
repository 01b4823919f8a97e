"""Bytes for a reader."""

import pytest

from glmlab.core.units import format_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (-(2**20), "-1.00 MiB"), (2**31, "2.00 GiB")],
)
def test_format(n_bytes, text):
    assert format_bytes(n_bytes) == text
