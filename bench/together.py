"""Clients trained as one computation beside the same clients one after the other: `medhive-simulate --together`.

    python bench/together.py                                  # small models on this machine's processor
    python bench/together.py --device cuda --clients 100 --batch 50

Local rounds of made images of 32 pixels, from the same weights; nothing else of a simulation is timed. Both in turn in one
process. Prints JSON: seconds of each, how many times faster together is, the largest difference between weights, and
whether doing it again gives the same bits.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import structlog
import torch
from machine import describe, load

from fl_client.local_round import LocalRound, local_round, local_rounds_together
from fl_client.tasks import RoundPlan, completed, together
from fl_client.tasks.training import ClassifierWorkspace
from simulator.command import simulation_of

SIDE, CLASSES, LR = 32, 10, 0.01


class Case:
    """So many clients of so many images, and a model for each."""

    def __init__(self, folder: Path, model: str, chosen: argparse.Namespace) -> None:
        self._chosen, self._model = chosen, model
        rng = np.random.default_rng(1)
        count = chosen.clients * chosen.images
        data = folder / "images.npz"
        images = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        np.savez(data, images=images, labels=np.arange(count) % CLASSES)
        options = (
            f"image_size={SIDE}",
            "channels=3",
            f"model={model}",
            "recipe=plain",
            "momentum=0.9",
            "crop=32",
            "pad=4",
        )
        flags = {"data": data, "test": data, "clients": chosen.clients, "device": chosen.device, "options": options}
        federation = simulation_of(flags).read_clients()
        self._clients: Sequence[Any] = [federation.workspace(place) for place in range(chosen.clients)]
        self._base = self._clients[0].initial_weights(1)
        self._plan = RoundPlan(
            round=1, rounds=2, local_epochs=chosen.epochs, batch_size=chosen.batch, lr=LR, mu=0.0, seed=1
        )

    def apart(self) -> list[LocalRound]:
        return [completed(local_round(client, self._base, self._plan)) for client in self._clients]

    def together(self) -> list[LocalRound]:
        found: list[Any] = []
        for first in range(0, len(self._clients), self._chosen.together):
            group: Sequence[ClassifierWorkspace] = self._clients[first : first + self._chosen.together]
            found += local_rounds_together(group, self._base, [self._plan] * len(group))
        return found

    def compare(self) -> dict[str, Any]:
        """Both in turn, after each has been done once."""
        apart, together, again = self.apart(), self.together(), self.together()
        times = [(timed(self.apart), timed(self.together)) for _ in range(self._chosen.repeats)]
        one, other = (median(column) for column in zip(*times, strict=True))
        return {
            "model": self._model,
            "clients": self._chosen.clients,
            "images_each": self._chosen.images,
            "batch": self._chosen.batch,
            "local_epochs": self._chosen.epochs,
            "together": self._chosen.together,
            "apart_s": one,
            "together_s": other,
            "times_faster": one / other,
            "difference": difference(apart, together),
            "same_bits_again": difference(together, again) == 0.0,
            "load_1min": load(),
        }


def timed(work: Callable[[], object]) -> float:
    """Seconds; what comes back lies in the processor's memory, so that a GPU has ended."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def difference(some: Sequence[LocalRound], others: Sequence[LocalRound]) -> float:
    """The largest between any two weights."""
    return max(
        float(np.abs(one.weights[name] - other.weights[name]).max())
        for one, other in zip(some, others, strict=True)
        for name in one.weights
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["lenet", "resnet-gn"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--images", type=int, default=50, help="of each client")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--together", type=int, help="clients at a time; all, if left out")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--always", action="store_true", help="also where a CPU would take one client after the other")
    chosen = parser.parse_args()
    chosen.together = chosen.together or chosen.clients
    if chosen.always:
        together.MOST_ON_CPU = math.inf
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    device = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for model in chosen.models:
            rows.append(Case(Path(folder), model, chosen).compare())
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    told = {"machine": describe(), "device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**told, "rounds": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
