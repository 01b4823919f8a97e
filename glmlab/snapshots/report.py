"""What the replay of a snapshot found, device by device and in sum."""

from dataclasses import dataclass, field
from typing import Any

from glmlab.allocator.caching import CachingAllocator


@dataclass
class DeviceReport:
    """What was compared on one GPU; ``notes`` says what could not be compared, and why."""

    device: int
    allocations: int = 0
    equal_addresses: int = 0
    segments: int = 0
    equal_segments: int = 0
    first_difference: str | None = None
    equal_final_state: bool = False
    notes: list[str] = field(default_factory=list)
    allocator: CachingAllocator | None = field(default=None, repr=False)

    @property
    def is_equal(self) -> bool:
        """Whether every address and every segment event is the allocator's choice."""
        return self.allocations == self.equal_addresses and self.segments == self.equal_segments

    def note(self, text: str) -> None:
        """Add a note, each one once."""
        if text not in self.notes:
            self.notes.append(text)

    def differs(self, index: int, text: str) -> None:
        """Keep the first difference only."""
        if self.first_difference is None:
            self.first_difference = f"device {self.device}, event {index}: {text}"


@dataclass(frozen=True)
class ReplayReport:
    """The comparison, device by device and in sum."""

    devices: tuple[DeviceReport, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every address and every segment event is the allocator's choice."""
        return all(device.is_equal for device in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``glmlab replay --json`` prints."""
        sums = {
            key: sum(getattr(device, key) for device in self.devices)
            for key in ("allocations", "equal_addresses", "segments", "equal_segments")
        }
        first = next((d.first_difference for d in self.devices if d.first_difference), None)
        devices = [
            {
                "device": d.device,
                "allocations": d.allocations,
                "equal_addresses": d.equal_addresses,
                "segments": d.segments,
                "equal_segments": d.equal_segments,
                "first_difference": d.first_difference,
                "equal_final_state": d.equal_final_state,
                "notes": d.notes,
            }
            for d in self.devices
        ]
        return {**sums, "first_difference": first, "devices": devices}

    def __str__(self) -> str:
        lines = []
        for d in self.devices:
            lines.append(
                f"device {d.device}: {d.equal_addresses} of {d.allocations} addresses and {d.equal_segments} of "
                f"{d.segments} segment events equal; final state {'equal' if d.equal_final_state else 'differs'}"
            )
            lines += [f"  first difference: {d.first_difference}"] if d.first_difference else []
            lines += [f"  note: {note}" for note in d.notes]
        return "\n".join(lines)
