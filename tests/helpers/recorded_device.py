"""An allocator that keeps a history as torch.cuda.memory does: snapshots for machines without a GPU."""

import random
from collections.abc import Callable
from typing import Any

from readable_replay import ReadableReplayer

from glmlab.allocator.blocks import Block, Pool
from glmlab.allocator.caching import CachingAllocator
from glmlab.allocator.config import DEFAULT_POOL, AllocatorSettings, OutOfMemory
from glmlab.core.units import MIB
from glmlab.tracing.trace import AllocationTrace, TurnTokens


class RecordedDevice(CachingAllocator):
    """An allocator that keeps a history as torch.cuda.memory does."""

    def __init__(
        self, settings: AllocatorSettings | None = None, capacity_bytes: int | None = None, seed: int = 1
    ) -> None:
        super().__init__(settings, capacity_bytes=capacity_bytes, address_seed=seed)
        self.history: list[dict[str, Any]] = []
        self.requested: dict[int, int] = {}
        self.current_pool = DEFAULT_POOL
        self.note = ""  # what torch.cuda.memory._set_memory_metadata set last
        self.frames: list[dict[str, Any]] = []

    def record(self, action: str, address: int, size: int, stream: int) -> None:
        event = {"action": action, "addr": address, "size": size, "stream": stream}
        self.history.append({**event, "frames": self.frames, "user_metadata": self.note, "time_us": len(self.history)})

    def pool(self, size: int, stream: int = 0, pool_id: tuple[int, int] = DEFAULT_POOL) -> Pool:
        return super().pool(size, stream, self.current_pool if pool_id == DEFAULT_POOL else pool_id)

    def add_segment(self, pool: Pool, address: int, size: int) -> Block:
        self.record("segment_alloc", address, size, pool.stream)
        return super().add_segment(pool, address, size)

    def map(self, address: int, n_bytes: int) -> Block:
        block = super().map(address, n_bytes)
        self.record("segment_map", address, n_bytes, block.pool.stream)
        return block

    def release(self, address: int, n_bytes: int) -> None:
        block = self.block_at(address)
        assert block is not None
        self.record("segment_unmap" if block.is_expandable else "segment_free", address, n_bytes, block.pool.stream)
        super().release(address, n_bytes)

    def malloc(self, n_bytes: int, stream: int = 0, *, owner: int = 0) -> Block:
        block = super().malloc(n_bytes, stream)
        self.requested[block.address] = n_bytes
        self.record("alloc", block.address, n_bytes, stream)
        return block

    def free(self, block: Block) -> None:
        for action in ("free_requested", "free_completed"):
            self.record(action, block.address, self.requested[block.address], block.pool.stream)
        super().free(block)

    def run(self, seed: int, n_events: int, sizes: Callable[[random.Random], int], streams: int = 1) -> None:
        """Allocate and free at random, with an empty_cache() now and then."""
        choose = random.Random(seed)
        live: list[Block] = []
        for _ in range(n_events):
            kind = choose.random()
            if kind < 0.01:
                self.empty_cache()
            elif kind < 0.5 and live:
                self.free(live.pop(choose.randrange(len(live))))
            else:
                try:
                    live.append(self.malloc(sizes(choose), stream=choose.randrange(streams) * 4096))
                except OutOfMemory as error:
                    self.history.append({"action": "oom", "device_free": error.free, "size": error.tried, "stream": 0})

    def snapshot(self, cut: int = 0, with_settings: bool = True) -> dict[str, Any]:
        segments = []
        for view in self.segments():
            head = self.block_at(view.address)
            assert head is not None
            segments.append(
                {
                    "device": 0,
                    "address": view.address,
                    "total_size": view.size,
                    "stream": view.stream,
                    "segment_type": view.pool,
                    "segment_pool_id": head.pool.pool_id,
                    "is_expandable": head.is_expandable,
                    "frames": [],
                    "blocks": [
                        {
                            "address": block.address,
                            "size": block.size,
                            "requested_size": self.requested[block.address] if block.live else 0,
                            "state": "active_allocated" if block.live else "inactive",
                        }
                        for block in view.blocks
                    ],
                }
            )
        made: dict[str, Any] = {"segments": segments, "device_traces": [self.history[cut:]]}
        if with_settings:
            chosen = self.settings
            made["allocator_settings"] = {
                "PYTORCH_CUDA_ALLOC_CONF": f"large_segment_size_mb:{chosen.large_segment_size_mb}",
                "max_split_size": -1 if chosen.max_split_size_mb is None else chosen.max_split_size_mb * MIB,
                "garbage_collection_threshold": 0.0,
                "expandable_segments": chosen.expandable_segments,
                "roundup_power2_divisions": {str(1 << i): d for i, d in enumerate(chosen.power2_divisions)},
            }
        return made


def traced_snapshot(trace: AllocationTrace, turn: TurnTokens, scratch_bytes: int = 0) -> dict[str, Any]:
    """The snapshot that a GPU would give of loading and one turn, if the trace told all but scratch in each row."""
    device = RecordedDevice()
    run = ReadableReplayer(trace.program, device)
    names = ["load", *map(str, range(turn.generated)), "end"]
    for name, row in zip(names, trace.schedule([turn]).tolist(), strict=True):
        if scratch_bytes:
            device.note = f"{name}|model.layers.3.mlp"
            device.frames = [{"name": "at::_ops::sort::call(at::Tensor const&)", "filename": "/home/somebody/x.cpp"}]
            device.free(device.malloc(scratch_bytes))
        device.note, device.frames = f"{name}|", []
        run.run([row])
    return device.snapshot()
