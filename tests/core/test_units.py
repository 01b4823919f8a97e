"""Bytes and their names have one home."""

import re
from pathlib import Path

import pytest

from glmlab.core.units import format_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (-(2**20), "-1.00 MiB"), (2**31, "2.00 GiB")],
)
def test_format(n_bytes, text):
    assert format_bytes(n_bytes) == text


def test_nothing_else_divides_by_powers_of_two():
    divides = re.compile(r"[^/]/\s*\(?(2\s*\*\*\s*(20|30)|1024\s*\*\*\s*[23]|1048576|1073741824|1\s*<<\s*(20|30))")
    offenders = [
        path.name
        for path in (ROOT / "glmlab").rglob("*.py")
        if path.name != "units.py" and divides.search(path.read_text())
    ]
    assert offenders == []
