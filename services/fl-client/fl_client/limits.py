"""What a hospital lets training have of its machine: hours, threads, memory, and a pause. Kept in site.db, never sent."""

from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, time
from typing import Any, Self

from fl_client.store import Store
from medhive.errors import InvalidInput

LIMITS = "limits"
# Address space, which is what the system limits, not memory in use. torch 2.13 and MONAI on one thread of a CPU take
# 1,090 MB of it when they are loaded and 1,200 MB in training on small images; with less, loading may never end.
SMALLEST_MEMORY_BYTES = 1_500_000_000
MAX_THREADS = 1024


@dataclass(frozen=True)
class Window:
    """Hours of the day, local time; one that ends before it begins goes over midnight."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `20:00-06:30`.

        Raises:
            InvalidInput: it is no such pair of times.
        """
        try:
            begin, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
        except ValueError as error:
            raise InvalidInput(f"{text!r} is no pair of times; write hours as 20:00-06:30.") from error
        if begin == end:
            raise InvalidInput(f"{text!r} is empty; leave the hours out to train at any time.")
        return cls(begin, end)

    def __contains__(self, moment: time) -> bool:
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True)
class Limits:
    """What training may use; None is "no limit".

    Attributes:
        hours: windows of local time in which training may run, such as `20:00-06:00`; none means always.
        cpu_threads: threads of the trainer.
        memory_bytes: address space of the trainer (Linux and macOS).
        gpu_memory_fraction: share of a GPU's memory.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        paused: a person has paused training.
    """

    hours: tuple[str, ...] = field(default=())
    cpu_threads: int | None = None
    memory_bytes: int | None = None
    gpu_memory_fraction: float | None = None
    device: str = "auto"
    paused: bool = False

    def __post_init__(self) -> None:
        for window in self.hours:
            Window.parse(window)
        if self.cpu_threads is not None and not 1 <= self.cpu_threads <= MAX_THREADS:
            raise InvalidInput(f"The number of CPU threads must lie between 1 and {MAX_THREADS}.")
        if self.memory_bytes is not None and self.memory_bytes < SMALLEST_MEMORY_BYTES:
            raise InvalidInput(
                f"The trainer needs at least {SMALLEST_MEMORY_BYTES // 1_000_000} MB of memory: with less its libraries do "
                "not load."
            )
        if self.gpu_memory_fraction is not None and not 0 < self.gpu_memory_fraction <= 1:
            raise InvalidInput("The share of GPU memory must lie above 0 and at most at 1.")

    def may_train(self, local_time: datetime) -> bool:
        """Whether training may run at a moment of local time."""
        if self.paused:
            return False
        return not self.hours or any(local_time.time() in Window.parse(window) for window in self.hours)

    @classmethod
    def load(cls, store: Store) -> Self:
        """The kept limits, or none."""
        kept: dict[str, Any] = store.fact(LIMITS) or {}
        memory = kept.get("memory_bytes")
        # Earlier versions let less be set; with it the trainer would hang, and a node that does not start helps nobody.
        enough = max(memory, SMALLEST_MEMORY_BYTES) if memory is not None else None
        return cls(**{**kept, "hours": tuple(kept.get("hours", ())), "memory_bytes": enough})

    def save(self, store: Store) -> None:
        """Keep them; a running node takes them over within a second or two."""
        store.set_fact(LIMITS, asdict(self))

    def with_changes(self, **changes: Any) -> Self:
        """The same with some values changed.

        Raises:
            InvalidInput: a value is out of range.
        """
        return replace(self, **changes)
