"""What a hospital's node shows to the hospital's own Prometheus: counted from its events, on loopback, if it is wanted."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from stack import free_port

from fl_client.events import Connected, Disconnected, NodeEvent, PauseChanged, RoundDone, RoundFailed, TaskRefused
from fl_client.monitoring import Figures
from fl_client.settings import Settings
from fl_client.store import Store
from medhive.errors import InvalidInput

NODE = cast(Any, SimpleNamespace(trainer_restarts=3))
EVENTS = (
    Connected("gateway"),
    Connected("fleet"),
    Disconnected("fleet", "no answer at https://hospital-proxy.example"),
    RoundDone("RUN_1", 1, 2, "train", {"train_loss": 0.5}, 1.5),
    RoundDone("RUN_1", 2, 2, "evaluate", {}, 0.5),
    RoundFailed("RUN_1", 2, "no-space", "The disk of /state/secret-place is full."),
    TaskRefused("RUN_2", 1, "not-allowed", "No consent of Dr. Noor covers it."),
    PauseChanged(True),
)


def test_events_are_counted_passed_on_and_shown_on_loopback(tmp_path: Path) -> None:
    heard: list[NodeEvent] = []
    settings = Settings(state_dir=tmp_path, metrics_port=free_port())
    figures = Figures(settings, heard.append)
    with figures.served_for(NODE, Store(tmp_path / "site.db")):
        for event in EVENTS:
            figures(event)
        page = httpx.get(f"http://127.0.0.1:{settings.metrics_port}/metrics", timeout=60).text
        with socket.socket() as other:  # nobody listens on the machine's other addresses
            assert other.connect_ex(("127.0.0.2", settings.metrics_port or 0)) != 0
    assert heard == list(EVENTS)
    for line in (
        'medhive_site_connected{to="gateway"} 1.0',
        'medhive_site_connected{to="fleet"} 0.0',
        'medhive_site_tasks_total{result="done"} 2.0',
        'medhive_site_tasks_total{result="failed"} 1.0',
        'medhive_site_tasks_total{result="refused"} 1.0',
        "medhive_site_rounds_trained_total 1.0",
        "medhive_site_work_seconds_total 120.0",
        "medhive_site_trainer_restarts_total 3.0",
        "medhive_site_paused 1.0",
    ):
        assert f"\n{line}\n" in page
    assert not [word for word in ("secret-place", "Noor", "hospital-proxy", "RUN_", str(tmp_path)) if word in page]


def test_nothing_listens_unless_it_is_wanted_and_a_taken_port_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "site.db")
    with Figures(Settings(state_dir=tmp_path), lambda _event: None).served_for(NODE, store):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(state_dir=tmp_path, metrics_port=taken.getsockname()[1])
        figures = Figures(settings, lambda _event: None)
        with pytest.raises(InvalidInput, match="MEDHIVE_SITE_METRICS_PORT"), figures.served_for(NODE, store):
            pass
