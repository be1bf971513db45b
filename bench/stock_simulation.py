"""Flower's own simulation as its documents show it, to measure beside MedHive's: stock FedAvg, arrays in the messages, Ray.

    python bench/stock_simulation.py DATA ROUNDS

The same model, images and steps as `simulation.py`, which starts this. Data and model stay in each of Ray's processes, which
is more than the documents' examples do. Prints the seconds of each round.
"""

import json
import os
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fl_client.tasks.image_training import whitened
from fl_client.tasks.models import build_model

CLIENTS, SAMPLES, SIDE, CLASSES, LR = 50, 50, 32, 10, 0.05

client = ClientApp()


@cache
def resident(data: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The model, (n, 3, side, side) images and (n,) labels of this process."""
    with np.load(data) as file:
        images, labels = np.moveaxis(file["images"], 3, 1).copy(), file["labels"]
    model = build_model("cnn", channels=3, classes=CLASSES, seed=1, side=SIDE).to(memory_format=torch.channels_last)
    return model, torch.from_numpy(images), torch.from_numpy(labels)


@client.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch in one batch."""
    model, images, labels = resident(os.environ["STOCK_DATA"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    start = int(context.node_config["partition-id"]) * SAMPLES
    batch = start + torch.randperm(SAMPLES)
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    loss = nn.functional.cross_entropy(model(whitened(images[batch].float())), labels[batch])
    loss.backward()
    optimiser.step()
    metrics = MetricRecord({"num-examples": SAMPLES, "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def rounds(data: str, count: int) -> list[float]:
    """Seconds of each round but the first, from the end of one to the end of the next."""
    from flwr.simulation import run_simulation  # noqa: PLC0415 - needs Ray, which a process of it has already

    ends: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        def ended(_round: int, _arrays: Any) -> None:
            ends.append(time.perf_counter())

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        strategy.start(grid, ArrayRecord(resident(data)[0].state_dict()), count + 1, evaluate_fn=ended)

    config = {
        "client_resources": {"num_cpus": 1},
        "init_args": {"num_cpus": os.cpu_count(), "_node_ip_address": "127.0.0.1"},
    }
    run_simulation(server, client, CLIENTS, backend_config=config)
    # The first is of the initial weights, the second has the start of Ray's processes in it.
    return [float(x) for x in np.diff(ends)[1:]]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ |= {"STOCK_DATA": str(Path(sys.argv[1]).absolute()), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0"}
    import stock_simulation  # by its name, so that Ray's processes import it once and keep what it holds

    print(json.dumps(stock_simulation.rounds(sys.argv[1], int(sys.argv[2]))))
