"""What a simulated round costs beside the bare PyTorch loop over the same batches, and whether memory grows with clients.

    python bench/simulation.py                # 50 clients of 50 images, one local epoch; then memory
    python bench/simulation.py --epochs 5 --no-memory

The bare loop is what one would write by hand for the same model and data: resident tensors, one resident model into which
the global weights are loaded for each client, SGD, and a running mean. Both are timed in turn in one process, which keeps
its freed memory from the beginning, as a simulation does, so that the loop gains by that too. Clients as one computation,
the backend ray, and Flower's own simulation, where Ray is installed, have their turns as well. Prints JSON.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import structlog
import torch
from machine import describe, load
from torch import nn

from fl_client.tasks.image_training import whitened
from simulator.command import simulation_of
from simulator.memory import keep_freed_memory
from simulator.run import Listener, simulate

GOAL = 1.15
TOGETHER = 10  # clients as one computation
CLIENTS, SAMPLES, SIDE, CLASSES, LR = 50, 50, 32, 10, 0.05
MEMORY_EXAMPLES, MEMORY_CLIENTS, MEMORY_COHORT, MEMORY_SIDE = 100_000, (100, 100_000), 10, 24
MEMORY_TEST = 200


def make_images(path: Path, count: int, side: int, channels: int) -> Path:
    """Random images with labels that mean nothing: only their number and size matter here."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % CLASSES)
    return path


def flags(data: Path, **changes: Any) -> dict[str, Any]:
    options = (f"image_size={SIDE}", "channels=3", "model=cnn", "recipe=plain")
    chosen = {
        "data": data,
        "clients": CLIENTS,
        "batch_size": SAMPLES,
        "lr": LR,
        "strategy": "fedavg",
        "options": options,
    }
    return {**chosen, "device": "cpu", **changes}


def simulated(data: Path, out: Path, epochs: int, rounds: int, **changes: Any) -> list[float]:
    """Seconds of each round but the first, from the end of one to the end of the next: everything is in them.

    The data themselves stand in for a test set, so that every example is trained on; it is judged at the end alone.
    """
    ends: list[float] = []
    listener = Listener(lambda *_: None, lambda _: ends.append(time.perf_counter()), lambda *_: None)
    chosen = flags(data, test=data, test_every=rounds + 2, local_epochs=epochs, rounds=rounds + 2, **changes)
    simulate(simulation_of(chosen), out, listener)
    # Without the last one, which is judged.
    return [float(x) for x in np.diff(ends)[:-1]]


class Bare:
    """The loop by hand."""

    def __init__(self, data: Path, epochs: int) -> None:
        from fl_client.tasks.models import build_model  # noqa: PLC0415

        with np.load(data) as file:
            self.images = torch.from_numpy(np.moveaxis(file["images"], 3, 1).copy())
            self.labels = torch.from_numpy(file["labels"])
        self.model = build_model("cnn", channels=3, classes=CLASSES, seed=1, side=SIDE)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.parts = torch.randperm(len(self.labels)).view(CLIENTS, SAMPLES)
        self.epochs = epochs

    def round(self) -> float:
        began = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        for part in self.parts:
            self.model.load_state_dict(self.weights)
            optimiser = torch.optim.SGD(self.model.parameters(), lr=LR)
            for _ in range(self.epochs):
                batch = part[torch.randperm(SAMPLES)]
                loss = nn.functional.cross_entropy(self.model(whitened(self.images[batch].float())), self.labels[batch])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            for name, value in self.model.state_dict().items():
                total[name] += value / CLIENTS
        self.weights = total
        return time.perf_counter() - began


def speed(folder: Path, epochs: int, rounds: int, repeats: int) -> dict[str, Any]:
    """All in turn; the ratio is that of the medians over all turns."""
    data = make_images(folder / "speed.npz", CLIENTS * SAMPLES, SIDE, 3)
    bare, ours, theirs, grouped = Bare(data, epochs), [], [], []
    spread: list[float] = []
    stock: list[float] = []
    bare.round()
    for turn in range(repeats):
        theirs += [bare.round() for _ in range(rounds)]
        ours += simulated(data, folder / f"out-{epochs}-{turn}", epochs, rounds)
        grouped += simulated(data, folder / f"together-{epochs}-{turn}", epochs, rounds, together=TOGETHER)
        if find_spec("ray") is not None:
            spread += simulated(data, folder / f"ray-{epochs}-{turn}", epochs, rounds, backend="ray")
            stock += flower(data, rounds) if epochs == 1 else []
    ratio = median(ours) / median(theirs)
    return {
        "local_epochs": epochs,
        "round_s": median(ours),
        "bare_loop_s": median(theirs),
        "ratio": ratio,
        "goal": GOAL,
        "together": TOGETHER,
        "together_s": median(grouped),
        "ray_s": median(spread) if spread else None,
        "flower_s": median(stock) if stock else None,
        "reached": ratio <= GOAL,
        "load_1min": load(),
    }


def flower(data: Path, rounds: int) -> list[float]:
    """Seconds of each round of Flower's own simulation, as its documents show it; in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("stock_simulation.py")), str(data), str(rounds)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(x) for x in json.loads(answer.stdout.splitlines()[-1])]


def memory(folder: Path) -> dict[str, Any]:
    """The peak of a process with few and with many clients, on the same examples and with cohorts of one size."""
    data = make_images(folder / "memory.npz", MEMORY_EXAMPLES, MEMORY_SIDE, 1)
    found = {}
    for clients in MEMORY_CLIENTS:
        command = [
            sys.executable,
            __file__,
            "--peak",
            str(clients),
            "--data",
            str(data),
            "--out",
            str(folder / f"m{clients}"),
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(clients)] = json.loads(answer.stdout.splitlines()[-1])["peak_mb"]
    few, many = found.values()
    return {"examples": MEMORY_EXAMPLES, "cohort": MEMORY_COHORT, "peak_mb": found, "growth_mb": many - few}


def peak(clients: int, data: Path, out: Path) -> dict[str, float]:
    """One simulation in this process, and the kernel's mark of its memory."""
    options = (f"image_size={MEMORY_SIDE}", "model=cnn", "recipe=plain")
    chosen = flags(data, clients=clients, fraction=MEMORY_COHORT / clients, options=options, rounds=2, local_epochs=1)
    # A small test set, so that all of the data is trained on and judging takes no memory.
    test = make_images(out.with_suffix(".npz"), MEMORY_TEST, MEMORY_SIDE, 1)
    simulate(simulation_of({**chosen, "test": test}), out, Listener(*[lambda *_: None] * 3))
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed in each turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if chosen.peak:
        print(json.dumps(peak(chosen.peak, chosen.data, chosen.out)))
        return 0
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = [speed(Path(folder), epochs, chosen.rounds, chosen.repeats) for epochs in chosen.epochs]
        result: dict[str, Any] = {"machine": describe(), "threads": torch.get_num_threads(), "rounds": rows}
        if not chosen.no_memory:
            result["memory"] = memory(Path(folder))
    print(json.dumps(result, indent=2))
    return 0 if all(row["reached"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
