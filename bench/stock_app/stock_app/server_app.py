"""Flower's FedAvg with a stopwatch."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):  # type: ignore[misc]
    """Notes the seconds of each round, from when the nodes are there to the new weights."""

    def __init__(self, nodes: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        self.seconds: list[float] = []
        self._began = 0.0

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        """As FedAvg."""
        messages = list(super().configure_train(*arguments))
        self._began = time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg."""
        result: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, list(replies))
        self.seconds.append(time.monotonic() - self._began)
        return result


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Do the rounds and write their seconds."""
    config = context.run_config
    rng = np.random.default_rng(1)
    shapes = json.loads(Path(str(config["shapes"])).read_text())
    arrays = {name: Array(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}
    strategy = TimedFedAvg(int(config["nodes"]))
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=int(config["rounds"]))
    answered = sum("num-examples" in metrics for metrics in result.train_metrics_clientapp.values())
    out = Path(str(config["out"]))
    part = out.with_suffix(".part")
    part.write_text(json.dumps({"seconds": strategy.seconds, "answered": answered}))
    part.rename(out)
