"""The dispatcher's decisions: leases kept and lost, processes started again, runs given up."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from round_world import HandClock, World

from fl_server.dispatcher import MAX_DEATHS, NEWEST_RUNS, Dispatcher
from fl_server.flower import FlowerRun, FlowerRunNotFound, RunPhase, SuperLink
from fl_server.nodes import NodeRegistry
from medhive.client import GatewayClient
from medhive.errors import Conflict, NotFound, Unreachable
from medhive.states import RunState
from medhive.wire import RunAnswer


@dataclass
class Links:
    """A SuperLink of dictionaries."""

    started: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[int, RunPhase] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    deaf: int = 0
    """So many starts are done without their answer's coming through."""
    tidied: int = 0
    """Runs that are over and were listed: each is work for Flower, each time."""

    def start_run(self, config: dict[str, Any]) -> int:
        self.started.append(config)
        self.phases[len(self.started)] = RunPhase.RUNNING
        if self.deaf:
            self.deaf -= 1
            raise Unreachable("The SuperLink does not answer.")
        return len(self.started)

    def runs(self, newest: int = 1000) -> dict[int, FlowerRun]:
        found = {number: self.run(number) for number in sorted(self.phases, reverse=True)[:newest]}
        self.tidied += sum(run.phase.is_over for run in found.values())
        return found

    def run(self, number: int) -> FlowerRun:
        if number not in self.phases:
            raise FlowerRunNotFound("The SuperLink knows no such run.")
        config = self.started[number - 1] if number <= len(self.started) else {}
        return FlowerRun(number, self.phases[number], "It broke.", config)

    def stop_run(self, number: int) -> bool:
        self.stopped.append(number)
        self.phases[number] = RunPhase.STOPPED
        return True


@dataclass
class Desk:
    """A gateway of one run."""

    run: RunAnswer
    leases: list[dict[str, Any]]
    fence: int = 1
    ended: list[Any] = field(default_factory=list)
    beats: int = 0
    lapsed: bool = False
    """The lease, while the gateway was away: whoever asks first for work has the run."""

    def get(self, path: str) -> Any:
        if not path.endswith(f"/{self.run.id}"):
            raise NotFound("There is no such run.")
        return self.run.model_dump(mode="json")

    def post(self, path: str, body: Any) -> Any:
        if path.endswith("/lease") and self.lapsed:
            self.lapsed, self.fence = False, self.fence + 1
            return {"run_id": self.run.id, "fence": self.fence, "expires_at": "2026-11-01T09:00:00Z"}
        if path.endswith("/lease"):
            return self.leases.pop(0) if self.leases else None
        if body.fence != self.fence:
            raise Conflict("The fence is over.", cause="stale-fence")
        if path.endswith("/end"):
            self.ended.append(body)
            self.run = self.run.model_copy(update={"state": RunState(body.state)})
        self.beats += path.endswith("/heartbeat")
        self.lapsed = False
        return self.run.model_dump(mode="json")


@dataclass
class Scene:
    folder: Path
    desk: Desk
    links: Links
    clock: HandClock

    def dispatcher(self, **changes: Any) -> Dispatcher:
        return Dispatcher(
            gateway=cast("GatewayClient", self.desk),
            superlink=cast("SuperLink", self.links),
            holder="server-1",
            leases_file=self.folder / "leases.json",
            runs_dir=self.folder / "runs",
            max_runs=changes.get("max_runs", 8),
            monotonic=self.clock.monotonic,
        )

    def pass_time(self, dispatcher: Dispatcher, seconds: float, starts: int = 10**6) -> None:
        """Let time pass, at most until so many processes were started."""
        end = self.clock.seconds + seconds
        while self.clock.seconds < end and len(self.links.started) < starts:
            dispatcher.step()
            self.clock.seconds += 1.0


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    world = World(tmp_path / "world")
    lease = {"run_id": "RUN_1", "fence": 1, "expires_at": "2026-11-01T09:00:00Z"}
    run = world.desk.run.model_copy(update={"state": RunState.RUNNING})
    return Scene(tmp_path, Desk(run, [lease]), Links(), HandClock())


def test_a_lease_becomes_one_flower_run_and_is_kept_alive(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 30)
    assert scene.links.started == [{"medhive-run": "RUN_1", "medhive-fence": 1}]
    assert scene.desk.beats == 6


def test_a_process_that_died_is_started_again_and_progress_is_remembered(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    for number in range(1, 9):
        scene.pass_time(dispatcher, 40, starts=number)
        scene.links.phases[number] = RunPhase.FAILED
        scene.desk.run = scene.desk.run.model_copy(update={"round": number})
    scene.pass_time(dispatcher, 10)
    assert len(scene.links.started) == 9
    assert scene.desk.ended == []


def test_a_run_whose_process_always_dies_fails_with_the_reason(scene: Scene) -> None:
    folder = scene.folder / "runs" / "RUN_1"
    folder.mkdir(parents=True)
    dispatcher = scene.dispatcher()
    for number in range(1, MAX_DEATHS + 1):
        scene.pass_time(dispatcher, 60, starts=number)
        scene.links.phases[number] = RunPhase.FAILED
    scene.pass_time(dispatcher, 60)
    assert len(scene.links.started) == MAX_DEATHS
    assert [end.state for end in scene.desk.ended] == ["failed"]
    assert "It broke." in scene.desk.ended[0].reason
    assert dispatcher.held == ()
    assert not folder.exists()


def test_a_lost_lease_is_let_go_and_its_process_ended(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    scene.desk.fence = 2
    scene.pass_time(dispatcher, 30)
    assert dispatcher.held == ()
    assert scene.links.stopped == [1]
    assert json.loads((scene.folder / "leases.json").read_text()) == {}


def test_a_start_whose_answer_was_lost_leaves_the_run_with_one_process(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.links.deaf = 1
    with pytest.raises(Unreachable):
        dispatcher.step()
    scene.pass_time(dispatcher, 5)
    assert (len(scene.links.started), scene.links.stopped) == (1, [])
    assert dispatcher.held[0].flower_run == 1


def test_of_two_processes_of_a_run_one_is_ended(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    scene.links.start_run({"medhive-run": "RUN_1", "medhive-fence": 1})  # an earlier start that took its time
    scene.pass_time(dispatcher, 2)
    assert scene.links.stopped == [2]
    assert dispatcher.held[0].flower_run == 1


def test_a_lease_that_lapsed_while_the_gateway_was_away_is_kept_where_nobody_took_it(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    scene.clock.seconds += 60.0
    scene.desk.lapsed = True
    scene.pass_time(dispatcher, 20)
    assert [(held.fence, held.flower_run) for held in dispatcher.held] == [(1, 1)]
    assert (len(scene.links.started), scene.links.stopped) == (1, [])


def test_folders_of_runs_that_ended_elsewhere_are_deleted(scene: Scene) -> None:
    for name in ("RUN_1", "RUN_2"):
        (scene.folder / "runs" / name).mkdir(parents=True)
    dispatcher = scene.dispatcher()
    dispatcher.remove_ended()
    assert {path.name for path in (scene.folder / "runs").iterdir()} == {"RUN_1"}
    scene.desk.run = scene.desk.run.model_copy(update={"state": RunState.FAILED})
    dispatcher.remove_ended()
    assert not list((scene.folder / "runs").iterdir())


def test_a_run_that_is_over_is_forgotten_with_its_folder(scene: Scene) -> None:
    folder = scene.folder / "runs" / "RUN_1"
    folder.mkdir(parents=True)
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    scene.desk.run = scene.desk.run.model_copy(update={"state": RunState.COMPLETED})
    scene.links.phases[1] = RunPhase.COMPLETED
    scene.pass_time(dispatcher, 20)
    assert dispatcher.held == ()
    assert not folder.exists()
    assert scene.links.stopped == []


def test_a_restarted_service_goes_on_with_its_leases_at_once(scene: Scene) -> None:
    scene.pass_time(scene.dispatcher(), 2)
    again = scene.dispatcher()
    again.stop_stale()
    scene.pass_time(again, 2)
    assert scene.links.stopped == [1]
    assert scene.links.started == [{"medhive-run": "RUN_1", "medhive-fence": 1}] * 2


def test_after_the_superexecs_death_all_processes_are_started_anew(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    dispatcher.restart_all()
    scene.pass_time(dispatcher, 2)
    assert (scene.links.stopped, len(scene.links.started)) == ([1], 2)


def test_runs_of_the_past_cost_nothing_and_hide_none_that_is_on(scene: Scene) -> None:
    dispatcher = scene.dispatcher()
    scene.pass_time(dispatcher, 2)
    scene.links.phases |= dict.fromkeys(range(2, 500), RunPhase.COMPLETED)
    scene.links.tidied = 0
    scene.pass_time(dispatcher, 10)
    assert scene.links.tidied <= 10 * NEWEST_RUNS
    assert [held.flower_run for held in dispatcher.held] == [1]
    scene.links.phases[1] = RunPhase.FAILED
    scene.pass_time(dispatcher, 10, starts=2)
    assert len(scene.links.started) == 2, "its end is seen as well"


def test_no_more_runs_than_allowed_are_leased(scene: Scene) -> None:
    scene.desk.leases.append({"run_id": "RUN_2", "fence": 1, "expires_at": "2026-11-01T09:00:00Z"})
    dispatcher = scene.dispatcher(max_runs=1)
    scene.pass_time(dispatcher, 3)
    assert [held.run_id for held in dispatcher.held] == ["RUN_1"]


def test_broken_lease_files_only_cost_time(scene: Scene) -> None:
    (scene.folder / "leases.json").write_text("[1")
    assert scene.dispatcher().held == ()


class Nodes:
    """Gateway and SuperLink of one node key."""

    def __init__(self) -> None:
        self.wanted = True
        self.told: list[tuple[str, str | None, bool]] = []
        self.registered: dict[int, Any] = {}
        self.online = False
        self.away = False

    def get(self, _path: str) -> list[dict[str, Any]]:
        return [{"site": "a", "node_public_key": "PEM", "wanted": self.wanted, "node_id": None}]

    def put(self, path: str, body: Any) -> None:
        self.told.append((path.rsplit("/", 1)[-1], body.node_id, body.online))

    def nodes(self) -> list[Any]:
        if self.away:
            raise Unreachable("away")
        return [node.__class__(node.node_id, self.online, node.public_key) for node in self.registered.values()]

    def register_node(self, pem: bytes) -> int:
        from fl_server.flower import NodeState  # noqa: PLC0415

        self.registered[7] = NodeState(7, False, pem)
        return 7

    def unregister_node(self, node_id: int) -> None:
        del self.registered[node_id]


def test_nodes_are_registered_reported_and_unregistered() -> None:
    world = Nodes()
    registry = NodeRegistry(cast("GatewayClient", world), cast("SuperLink", world))
    registry.sync()
    registry.sync()
    world.online = True
    registry.sync()
    world.away = True
    with pytest.raises(Unreachable):
        registry.sync()
    world.away, world.wanted = False, False
    registry.sync()
    assert world.told == [("a", "7", False), ("a", "7", True), ("a", None, False)]
    assert world.registered == {}
