"""Requests and allocator settings that reach every rule of the allocator, for property tests."""

import hypothesis.strategies as st

from glmlab.allocator.config import AllocatorSettings
from glmlab.core.units import MIB

SETTINGS = [
    AllocatorSettings(),
    AllocatorSettings(max_split_size_mb=32),
    AllocatorSettings(roundup_power2_divisions=4),
    AllocatorSettings(roundup_power2_divisions={1: 8, 4: 2, 16: 0}),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(expandable_segments=True, max_split_size_mb=24, large_segment_size_mb=24),
    AllocatorSettings(max_split_size_mb=21, max_non_split_rounding_mb=2),
]
THRESHOLDS = [1, 512, *(n * MIB for n in (1, 2, 10, 19, 20, 21, 32))]
SIZES = st.one_of(
    st.integers(1, 4096),
    st.sampled_from(THRESHOLDS).flatmap(lambda n: st.integers(max(n - 600, 1), n + 600)),
    st.integers(1, 48 * MIB),
)
