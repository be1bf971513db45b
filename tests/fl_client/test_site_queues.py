"""The contribution queue at the hospital: its own consent decides, real training, an upload that finds its way."""

import contextlib
import shutil
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from site_data import IMAGES, make_images
from site_world import World, later, running
from stack import Stack

from fl_client import policy, queues
from fl_client.consents import DataCheck, check_data, deliver
from fl_client.events import ConsentGiven, QueueConsentWanted
from fl_client.gateway import BACK_TO_FIRST_S, Gateway
from fl_client.identity import detour_since
from fl_client.jobs import JobEvent, Started
from fl_client.limits import Limits
from fl_client.queues import OtherInitialWeights, QueueClient, TrainingPaused, TrainingUnderWay
from fl_client.site import Site
from fl_client.trainer import Trainer
from medhive.client import Trust
from medhive.errors import Expired, InvalidInput, NotAllowed, NotAuthenticated, NotFound, Unreachable
from medhive.packing import sha256_file
from medhive.queues import QueueAnswer, QueueOptions
from medhive.wire import API


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    world.study("tumours", "image-folder", IMAGES)
    world.admin.put(f"{API}/studies/tumours/queue", {"local_epochs": 1, "capacity": 10})
    yield world
    world.close()


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    return world.join("north", "tumours", data=make_images(world.folder / "images"))


@pytest.fixture(scope="module")
def trainer(site: Site) -> Iterator[Trainer]:
    with site.trainer() as trainer:
        yield trainer


@pytest.fixture(scope="module")
def check(site: Site, trainer: Trainer) -> DataCheck:
    return check_data(site, trainer, site.gateway.queue("tumours").spec)


def agreed(site: Site, check: DataCheck, **limits: object) -> QueueAnswer:
    queue = site.gateway.queue("tumours")
    queues.grant_queue(site, queue, person="Dr. North", check=check, **limits)  # type: ignore[arg-type]
    return queue


def test_nothing_is_trained_without_the_own_consent(site: Site, trainer: Trainer, check: DataCheck) -> None:
    client = QueueClient(site, trainer)
    assert client.study == "tumours" and queues.unanswered_queues(site) == [site.gateway.queue("tumours").id]
    with pytest.raises(NotAllowed, match="not agreed"):
        client.train_federated()
    queue = agreed(site, check)
    assert queues.unanswered_queues(site) == []
    assert queues.valid_queue_consent(site, queue, later(0)).dataset_fingerprint == check.fingerprint
    with pytest.raises(Expired):
        queues.valid_queue_consent(site, queue, later(24 * 31))
    queues.decline_queue(site, queue, person="Dr. North", reason="not this year")
    with pytest.raises(NotAllowed, match="declined"):
        client.train_federated()


def test_a_specification_that_is_not_its_hash_is_not_signed(site: Site, check: DataCheck) -> None:
    queue = site.gateway.queue("tumours")
    other = queue.spec.model_copy(update={"options": QueueOptions(local_epochs=99)})
    with pytest.raises(InvalidInput, match="not the one that its hash names"):
        queues.grant_queue(site, queue.model_copy(update={"spec": other}), person="Dr. North", check=check)
    with pytest.raises(InvalidInput, match="within a year"):
        agreed(site, check, valid_for=timedelta(days=4000))


def test_from_no_model_to_a_contribution(world: World, site: Site, trainer: Trainer, check: DataCheck) -> None:
    client = QueueClient(site, trainer)
    agreed(site, check)
    with pytest.raises(NotFound, match="no model yet"):
        client.download_global_model()
    with pytest.raises(NotFound, match="train first"):
        client.send_update_to_server()
    trained = client.train_federated()
    assert (trained.body.base_version, trained.body.examples > 0) == (0, True)
    assert "train_loss" in trained.body.metrics and not any("/" in name for name in trained.body.metrics)
    assert client.waits_to_be_sent and client.check_server_status().newest_version == 0
    assert client.download_global_model().version == 0
    sent = client.send_update_to_server()
    assert (str(sent.state), sent.digest) == ("waiting", trained.body.content_digest)
    assert not client.waits_to_be_sent and not trained.file.exists()
    status = client.check_server_status()
    assert (status.queue_size, str(status.state)) == (1, "partial")
    stored = world.admin.get(f"{API}/studies/tumours/queue/contributions")[0]
    assert (stored["site"], stored["examples"]) == ("north", trained.body.examples)


def test_a_second_hospital_compares_the_initial_weights(world: World, site: Site, trainer: Trainer) -> None:
    other = world.join("south", "tumours", data=make_images(world.folder / "images-south", seed=2))
    with other.trainer() as own:
        agreed(other, check_data(other, own, other.gateway.queue("tumours").spec))
        client = QueueClient(other, own, "tumours")
        assert client.train_federated().body.base_version == 0
        honest = client._initial
        client._initial = lambda *words: (honest(*words)[0], "0" * 64)  # type: ignore[method-assign]
        with pytest.raises(OtherInitialWeights, match="Compare the versions"):
            client.train_federated()


def test_a_consent_is_used_up(site: Site, trainer: Trainer, check: DataCheck) -> None:
    agreed(site, check, contributions=1)
    client = QueueClient(site, trainer)
    client.train_federated()
    client.send_update_to_server()
    with pytest.raises(NotAllowed, match="covers 1 contributions"):
        client.train_federated()


def test_a_pause_holds_here_too(site: Site, trainer: Trainer, check: DataCheck) -> None:
    agreed(site, check)
    before = site.limits()
    before.with_changes(paused=True).save(site.store)
    try:
        with pytest.raises(TrainingPaused):
            QueueClient(site, trainer).train_federated()
    finally:
        before.save(site.store)
    assert isinstance(site.limits(), Limits)


def test_two_trainings_for_a_queue_do_not_mix(site: Site, trainer: Trainer, check: DataCheck) -> None:
    agreed(site, check)
    refused: list[str] = []

    def train_beside(event: JobEvent) -> None:
        # On the supervisor's thread, in the middle of the first one's work.
        if isinstance(event, Started) and not refused:
            with pytest.raises(TrainingUnderWay) as caught:
                QueueClient(site, trainer).train_federated()
            refused.append(str(caught.value))

    client = QueueClient(site, trainer)
    trained = client.train_federated(train_beside)
    assert refused == ["Another training for the queue of tumours is under way here; wait for its end."]
    assert sha256_file(trained.file) == trained.body.content_digest
    assert client.send_update_to_server().digest == trained.body.content_digest


def test_a_withdrawal_stops_the_training_and_takes_out_what_waits(
    world: World, site: Site, trainer: Trainer, check: DataCheck
) -> None:
    queue, started = agreed(site, check), threading.Event()

    def withdraw(event: JobEvent) -> None:
        if isinstance(event, Started) and not started.is_set():
            started.set()
            queues.withdraw_queue(site, queue.id, person="Dr. North", reason="a question")

    with pytest.raises(NotAllowed, match="withdrawn"):
        QueueClient(site, trainer).train_federated(withdraw)
    assert not QueueClient(site, trainer).waits_to_be_sent
    states = {row["state"] for row in world.admin.get(f"{API}/studies/tumours/queue/contributions")}
    assert states == {"withdrawn"}
    with pytest.raises(NotFound):
        queues.withdraw_queue(site, queue.id, person="Dr. North")


def test_a_withdrawal_that_arrived_without_its_receipt_is_not_refused(
    site: Site, check: DataCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, post = agreed(site, check), site.gateway.post

    def heard_and_cut(path: str, body: object) -> None:
        post(path, body)
        raise Unreachable("cut")

    with monkeypatch.context() as cut:
        cut.setattr(site.gateway, "post", heard_and_cut)
        assert not queues.withdraw_queue(site, queue.id, person="Dr. North")
    assert [refused for _item, refused in deliver(site)] == [None]


def test_a_withdrawal_is_never_kept_without_being_queued(site: Site, check: DataCheck) -> None:
    queue = agreed(site, check)
    with closing(sqlite3.connect(site.store.path, isolation_level=None)) as db:
        db.execute("CREATE TRIGGER killed BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'killed'); END")
        with pytest.raises(sqlite3.IntegrityError, match="killed"):
            queues.withdraw_queue(site, queue.id, person="Dr. North")
        db.execute("DROP TRIGGER killed")
    assert queues.withdraw_queue(site, queue.id, person="Dr. North"), "else nobody could withdraw again"


def signed(site: Site, **bounds: object) -> None:
    """A policy in force at a hospital, within whose bounds the queue is but for these."""
    values = {"studies": ("tumours",), "max_rounds": 2, "valid_for": timedelta(days=30), **bounds}
    policy.sign_policy(site, person="Prof. Chief", **values)  # type: ignore[arg-type]


def test_a_policy_answers_for_a_queue_as_for_a_run(world: World, trainer: Trainer) -> None:
    west = world.join("west", "tumours", data=make_images(world.folder / "images-west", seed=3))
    queue = west.gateway.queue("tumours")
    assert queues.policy_on(west, queue) == ""
    for bounds, words in (
        ({"studies": ("lungs",)}, "the policy does not name the study tumours"),
        ({"min_sites": 5}, "the policy wants at least 5 sites in a queue"),
        ({"strategies": ("krum",)}, "the policy does not name the strategy fedavg"),
    ):
        signed(west, **bounds)
        assert queues.policy_on(west, queue) == words
    longer = queue.spec.model_copy(update={"options": QueueOptions(local_epochs=2)})
    signed(west, max_local_epochs=1)
    assert queues.policy_on(west, queue.model_copy(update={"spec": longer})) == (
        "the queue has 2 local epochs, the policy allows 1"
    )
    signed(west, strategies=("krum",))
    with pytest.raises(NotAllowed, match="not agreed"):
        QueueClient(west, trainer).train_federated()
    with running(west, None, trainer) as node:
        wanted = node.wait(QueueConsentWanted)
        assert (wanted.queue_id, wanted.note) == (queue.id, "the policy does not name the strategy fedavg")
        signed(west, strategies=("fedavg",))
        given = node.wait(ConsentGiven)
    assert (given.run_id, given.given_by, given.person) == (queue.id, "policy", "Prof. Chief")
    body = queues.valid_queue_consent(west, queue, later(0))
    assert (body.max_rounds, body.person) == (2, "Prof. Chief")
    assert [str(item.state) for item in west.gateway.queue("tumours").consents if item.site == "west"] == ["granted"]


def test_a_policy_agrees_to_a_queue_where_no_node_runs(world: World, trainer: Trainer) -> None:
    east = world.join("east", "tumours", data=make_images(world.folder / "images-east", seed=4))
    signed(east, max_rounds=1)
    client = QueueClient(east, trainer)
    client.train_federated()
    client.send_update_to_server()
    with pytest.raises(NotAllowed, match="covers 1 contributions"):
        client.train_federated()


# ---- several addresses ---------------------------------------------------------------------------------------------


class Wire:
    """Passes bytes on to the gateway until it is cut; `limit` bytes to the gateway, then it dies as a machine would."""

    def __init__(self, target: int, limit: int = 10**9, port: int = 0) -> None:
        self._target, self._left = target, limit
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("localhost", port))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(("localhost", self._target))
            self._open += [near, far]
            threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(65536):
                if counted:
                    self._left -= len(data)
                    if self._left < 0:
                        self.cut()
                        return
                target.sendall(data)
        except OSError:
            return

    def cut(self) -> None:
        """Refuse new connections and break the open ones."""
        self._server.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def test_an_upload_goes_on_at_the_second_address(
    world: World, site: Site, trainer: Trainer, check: DataCheck, tmp_path: Path
) -> None:
    agreed(site, check)
    client = QueueClient(site, trainer)
    trained = client.train_federated()
    size = trained.file.stat().st_size
    assert size > 200_000
    wire = Wire(int(world.stack.url.rpartition(":")[2]), limit=size // 2)
    addresses = f"https://localhost:{wire.port},{world.stack.url}"
    settings = site.settings.model_copy(update={"server_address": addresses})
    with Site.open(settings) as away:
        sent = QueueClient(away, trainer, "tumours").send_update_to_server()
        assert sent.digest == trained.body.content_digest and str(sent.state) == "waiting"
        assert away.gateway.address == world.stack.url
    wire.cut()


def test_the_first_address_is_used_again_when_it_is_back(world: World, site: Site) -> None:
    now = [0.0]
    dead = socket.create_server(("localhost", 0))
    port = int(dead.getsockname()[1])
    dead.close()
    first = f"https://localhost:{port}"
    trust = site.identity.trust(None)
    assert isinstance(trust, Trust)
    gateway = Gateway((first, world.stack.url), trust, lambda _at: None, monotonic=lambda: now[0])  # type: ignore[arg-type, return-value]
    try:
        gateway.coordinator()
        assert gateway.address == world.stack.url
        back = Wire(int(world.stack.url.rpartition(":")[2]), port=port)
        gateway.coordinator()
        assert gateway.address == world.stack.url
        now[0] += BACK_TO_FIRST_S + 1
        gateway.coordinator()
        assert gateway.address == first
        back.cut()
    finally:
        gateway.close()


def test_meeting_an_address_again_leaves_no_connection_open(world: World, site: Site) -> None:
    """As every minute, where the first address does not know this hospital."""
    trust = site.identity.trust(None)
    with Gateway((world.stack.url,), trust, lambda _at: None, trust_anew=lambda _address: (trust, False)) as gateway:  # type: ignore[arg-type, return-value]
        [client] = gateway._clients
        for _ in range(3):
            gateway.coordinator()
            gateway._pass_over(client, NotAuthenticated("not known here"))
        assert client._former == []


@pytest.fixture(scope="module")
def ignorant(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway of the same coordinator, by its key, that knows no hospital: a second one that was set up empty."""
    stack = Stack(tmp_path_factory.mktemp("ignorant"), mlflow=False)
    shutil.copytree(world.stack.gateway_state / "secrets", stack.gateway_state / "secrets")
    stack.start_gateway()
    yield stack
    stack.stop()


def test_an_address_that_does_not_know_this_hospital_is_passed_over(world: World, site: Site, ignorant: Stack) -> None:
    settings = site.settings.model_copy(update={"server_address": f"{ignorant.url},{world.stack.url}"})
    with Site.open(settings) as away:
        assert [study.name for study in away.gateway.studies()] == ["tumours"]
        assert away.gateway.address == world.stack.url
        since = detour_since(away.store, world.stack.url)
        assert since is not None and since <= datetime.now(UTC)
        # The token is asked for where this hospital is known, and what it is asked against is signed for each address.
        before = away.store.fact("token")
        away.gateway.renew()
        assert away.store.fact("token") != before
        assert away.gateway.queue_status("tumours").capacity == 10
    with Site.open(settings) as again:
        again.gateway.studies()
        assert detour_since(again.store, world.stack.url) == since
    with Site.open(site.settings) as home:
        home.gateway.studies()
        assert detour_since(home.store, home.gateway.address) is None and home.store.fact("detour") is None
    alone = site.settings.model_copy(update={"server_address": ignorant.url})
    with Site.open(alone) as lost, pytest.raises(NotFound, match="no site north"):
        lost.gateway.studies()
    nobody = site.settings.model_copy(update={"server_address": f"{ignorant.url},https://localhost:9"})
    with Site.open(nobody) as waiting, pytest.raises(Unreachable, match="localhost:9"):
        waiting.gateway.renew()
