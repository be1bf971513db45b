"""The watch asks the coordinator only about what an event has touched, and a burst of events is one look."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import numpy as np
import pytest
from site_data import TABLE, make_table
from site_world import DEADLINE_S, Running, World, running, wait_for

from fl_client import consents, updates
from fl_client.consents import DataCheck
from fl_client.events import Connected, ConsentWanted, NodeEvent, Problem, RunFinished, VersionArrived
from fl_client.site import Site
from fl_client.trainer import Trainer
from fl_client.watch import Touched, Watch
from medhive.client import RemoteError
from medhive.errors import MedHiveError, NoSpace, Unreachable
from medhive.packing import write_weights
from medhive.wire import API, EventAnswer

STUDIES = ("heart", "lungs", "liver")
CHECK = DataCheck("ab" * 32, 100, {}, {})
# So that nothing but events makes the node look.
SELDOM_S = 3600.0
NO_TRAINER = cast(Trainer, None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    for name in STUDIES:
        world.study(name, "tabular", TABLE)
    yield world
    world.close()


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    make_table(world.folder / "data")
    joined = world.join("north", *STUDIES, data=world.folder / "data")
    return world.open(joined.settings.model_copy(update={"sync_s": SELDOM_S}))


class Asked:
    """The paths that a site has asked the gateway for; questions wait while `may` is cleared."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self.may = threading.Event()
        self.may.set()
        call = site.gateway._call

        def recorded(exchange: Any) -> Any:
            assert self.may.wait(DEADLINE_S)
            return call(lambda client: exchange(_Recorder(client, self.paths)))

        monkeypatch.setattr(site.gateway, "_call", recorded)


class _Recorder:
    """A connection that notes which paths it is asked for."""

    def __init__(self, client: Any, paths: list[str]) -> None:
        self._client, self._paths = client, paths

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def noted(path: str, *args: Any, **named: Any) -> Any:
            self._paths.append(path)
            return method(path, *args, **named)

        return noted


def listening(node: Running, world: World, site: Site) -> None:
    """Wait until the node's event stream is up: from then on it hears of everything."""
    node.wait(Connected, count=2)
    run = world.run("heart", min_sites=1)
    wait_for(lambda: site.store.run(run.id) is not None, "the first event being heard")


def events_of(site: Site, after: int) -> int:
    return len(site.gateway._call(lambda client: client.get(f"{API}/events", after=after, limit=1000)))


def test_a_burst_of_events_is_one_look(world: World, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(site) as node:
        listening(node, world, site)
        before = site.gateway.head().body.number
        asked = Asked(site, monkeypatch)
        asked.may.clear()  # the look at the first event lasts until all have happened, however slow this machine is
        runs = [world.run("lungs", min_sites=1) for _ in range(6)]
        for run in runs:
            world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": "test"})
        asked.may.set()
        wait_for(lambda: len([run for run in site.store.runs() if run.announced]) >= len(runs), "all ends being seen")
        requests = len(asked.paths)
        events = events_of(site, before)
    assert events >= 18, "each run is asked for, approved, made and ended"
    assert requests <= events / 2


def test_a_version_comes_with_the_end_of_its_run(world: World, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(site) as node:
        listening(node, world, site)
        release(world, site, 0.5)
        arrived, finished = node.wait(VersionArrived), node.wait(RunFinished)
        assert finished.version == arrived.version
        assert finished.file == arrived.file
        overtaking = release(world, site, 0.6)
        node.wait(RunFinished, count=2)
        assert [item.version for item in updates.undecided(site)] == [overtaking]
        asked = Asked(site, monkeypatch)
        world.admin.post(f"{API}/studies/heart/versions/{arrived.version}/export", {"site": site.name})
        again = node.wait(VersionArrived, count=3)
        assert (again.version, again.candidate) == (arrived.version, True)
        # The run's own last event may be heard of as late as this.
        assert set(asked.paths) - {f"{API}/runs"} == {f"{API}/studies/heart/versions"}, (
            "the versions of that study alone"
        )
    assert [item.version for item in updates.undecided(site)] == [overtaking, arrived.version]


@pytest.mark.parametrize("error", [Unreachable("cut"), RemoteError("500")], ids=["away", "in trouble"])
def test_a_look_that_was_cut_off_loses_no_run(
    error: MedHiveError, world: World, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[NodeEvent] = []
    watch = Watch(site, NO_TRAINER, seen.append, lambda _name, _work: None)
    watch.look()
    wanted = world.run("heart", min_sites=1)
    # A later change of another run, further behind the first one than the time that is asked for twice.
    monkeypatch.setattr("fl_client.watch.CHANGED_OVERLAP", timedelta(0))
    world.run("lungs", min_sites=1)
    with monkeypatch.context() as cut:
        cut.setattr(site.gateway, "studies", raising(error))
        with pytest.raises(type(error)):
            watch.look()
    watch.look()
    assert wanted.id in [event.run_id for event in seen if isinstance(event, ConsentWanted)]


def test_an_export_that_could_not_be_looked_at_is_looked_at_later(
    world: World, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    watch = Watch(site, NO_TRAINER, lambda _event: None, lambda _name, _work: None)
    monkeypatch.setattr(watch, "_look_at_export", lambda _study, version: looked.append(version))
    watch.hear(event("version.exported", study="heart", site=site.name, data={"version": 7}))
    with monkeypatch.context() as cut:
        cut.setattr(site.store, "outbox", raising(NoSpace("full")))
        with pytest.raises(NoSpace):
            watch.follow()
    watch.follow()
    assert looked == [7]


def test_a_version_that_cannot_be_kept_stops_nothing_else(world: World, site: Site) -> None:
    seen: list[NodeEvent] = []
    watch = Watch(site, NO_TRAINER, seen.append, lambda _name, _work: None)
    folder, aside = site.folder("models") / "heart", site.folder("models") / "aside"
    if folder.exists():
        folder.rename(aside)
    folder.write_text("in the way")
    release(world, site, 0.4)
    wanted = world.run("lungs", min_sites=1)
    watch.look()
    assert "versions of heart" in [event.what for event in seen if isinstance(event, Problem)]
    assert wanted.id in [event.run_id for event in seen if isinstance(event, ConsentWanted)]
    folder.unlink()
    if aside.exists():
        aside.rename(folder)
    watch.look()
    assert [event.study for event in seen if isinstance(event, VersionArrived)] == ["heart"]


def raising(error: Exception) -> Any:
    def work(*_: Any, **__: Any) -> Any:
        raise error

    return work


def release(world: World, site: Site, value: float) -> int:
    """A run that ends with these weights; returns the version's number."""
    run = world.run("heart", min_sites=1)
    consents.grant(site, run, person="Dr. North", check=CHECK)
    lease = world.lease(run)
    file = world.folder / f"{run.id}.safetensors"
    write_weights(file, {"w": np.full(4, value, dtype=np.float32)})
    world.end(run, lease, world.put(run, file), metrics={"val_accuracy": value})
    version = world.look(run.id).version
    assert version is not None
    return version


def event(kind: str, **fields: Any) -> EventAnswer:
    values = {"number": 1, "at": "2026-01-01T00:00:00Z", "actor": "admin", "subject": "", "data": {}}
    return EventAnswer.model_validate({**values, "kind": kind, "previous": "", "hash": "", **fields})


@pytest.mark.parametrize(
    ("heard", "touched"),
    [
        (event("round.closed", run_id="RUN_1", study="heart"), Touched(runs=True)),
        (event("run.ready", run_id="RUN_1", study="heart"), Touched(runs=True)),
        (event("version.offered", study="heart"), Touched(versions=frozenset({"heart"}))),
        (
            event("version.exported", study="heart", site="south", data={"version": 2}),
            Touched(versions=frozenset({"heart"})),
        ),
        (
            event("version.exported", study="heart", site="north", data={"version": 2}),
            Touched(versions=frozenset({"heart"}), exports=frozenset({("heart", 2)})),
        ),
        (event("request.sent", study="heart"), Touched()),
        (event("decision.accepted", study="heart", site="north"), Touched()),
        (event("site.connected", site="north"), Touched()),
        (event("site.revoked", site="north"), Touched(everything=True)),
        (event("study.member-added", study="heart", site="north"), Touched(everything=True)),
        (event("weather.changed"), Touched(everything=True)),
    ],
)
def test_what_an_event_touches(heard: EventAnswer, touched: Touched) -> None:
    assert Touched.by(heard, "north") == touched
    assert bool(touched) == (touched != Touched())


def test_what_several_events_touch_adds_up() -> None:
    runs, versions = Touched(runs=True), Touched(versions=frozenset({"heart"}))
    assert runs | versions | Touched() == Touched(runs=True, versions=frozenset({"heart"}))
