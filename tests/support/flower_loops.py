"""Round loops that stand in for the real one in the tests of the Flower adapters; run inside a real ServerApp process."""

import json
import os
from pathlib import Path
from typing import Any

from fl_server.flower import GridExchange, NodeUnknown, RunStopped


def scripted(exchange: GridExchange, config: dict[str, Any]) -> None:
    """Play the script in the run's name: in each round, one message to each node, then wait for all the answers."""
    script = json.loads(config["medhive-run"])
    out = Path(script["out"])
    _note(out, started=os.getpid(), fence=config["medhive-fence"])
    try:
        for number in range(script["rounds"]):
            _round(exchange, script, number, out)
    except RunStopped:
        _note(out, stopped=True)
        raise
    _note(out, finished=True)


def _round(exchange: GridExchange, script: dict[str, Any], number: int, out: Path) -> None:
    for copy in range(script.get("copies", 1)):
        for node in script["nodes"]:
            try:
                exchange.send(node, f"{number}.{copy}".encode(), ttl_s=script.get("ttl_s", 60.0))
            except NodeUnknown:
                _note(out, round=number, node=node, error="unknown")
    _note(out, sent=number)
    while exchange.waiting:
        for reply in exchange.wait(1.0):
            payload = None if reply.payload is None else reply.payload.decode()
            _note(out, round=number, node=reply.node_id, payload=payload, error=reply.error)


def _note(out: Path, **entry: Any) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
