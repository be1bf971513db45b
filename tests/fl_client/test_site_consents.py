"""Consent at the hospital: by a person, by an own request, by a signed policy; and what never follows by itself."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from site_data import TABLE, make_table
from site_world import World, later, wait_for

from fl_client import consents, policy, requests
from fl_client.consents import DataCheck, Permission
from fl_client.site import Site, one_at_a_time
from fl_client.trainer import Trainer
from medhive.client import RemoteError
from medhive.errors import BadSignature, Conflict, Expired, InvalidInput, MedHiveError, NotAllowed, NotFound
from medhive.wire import API, RunAnswer

CHECK = DataCheck("ab" * 32, 100, {"healthy": 50, "ill": 50}, {"corrupt": 2})
MONTH = timedelta(days=30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    world.study("heart", "tabular", TABLE)
    yield world
    world.close()


@pytest.fixture(scope="module")
def site(world: World) -> Site:
    make_table(world.folder / "data")
    return world.join("north", "heart", data=world.folder / "data")


@pytest.fixture(scope="module")
def south(world: World) -> Site:
    return world.join("south", "heart")


@pytest.fixture
def run(world: World, site: Site, south: Site) -> RunAnswer:
    return world.run("heart", rounds=2, min_sites=1)


def test_a_person_consents_after_the_data_were_checked(world: World, site: Site, run: RunAnswer) -> None:
    assert run.id in [item.run.id for item in consents.open_runs(site)]
    with Trainer() as trainer:
        check = consents.check_data(site, trainer, run.spec)
    assert check.examples == 200
    sent = consents.grant(site, run, person="Dr. North", check=check)
    assert sent.delivered
    assert run.id not in [item.run.id for item in consents.open_runs(site)]
    own = next(item for item in world.look(run.id).consents if item.site == "north")
    assert own.consent is not None
    assert own.consent.body.dataset_fingerprint == check.fingerprint
    assert "ward" not in own.consent.model_dump_json()
    given = consents.valid_consent(site, run.id, later(0))
    assert (given.state, given.given_by) == ("granted", "person")


def test_a_second_answer_is_refused(site: Site, run: RunAnswer) -> None:
    consents.decline(site, run, person="Dr. North", reason="no time")
    with pytest.raises(Conflict, match="declined"):
        consents.grant(site, run, person="Dr. North", check=CHECK)
    with pytest.raises(NotAllowed, match="declined"):
        consents.valid_consent(site, run.id, later(0))


def test_a_withdrawal_counts_at_once(world: World, site: Site, run: RunAnswer) -> None:
    consents.grant(site, run, person="Dr. North", check=CHECK)
    consents.withdraw(site, run.id, person="Dr. North", reason="changed mind")
    with pytest.raises(NotAllowed, match="withdrawn"):
        consents.valid_consent(site, run.id, later(0))
    states = {item.site: item.state for item in world.look(run.id).consents}
    assert states["north"] == "withdrawn"
    with pytest.raises(Conflict, match="withdrawn already"):
        consents.withdraw(site, run.id, person="Dr. North")


def test_new_scans_wait_for_a_run_that_counts_on_the_data(site: Site, run: RunAnswer, tmp_path: Path) -> None:
    consents.grant(site, run, person="Dr. North", check=CHECK)
    own = site.data_dir("heart")
    assert run.id in consents.runs_counting_on(site, own)
    assert run.id in consents.runs_counting_on(site, own / "2024")
    assert run.id in consents.runs_counting_on(site, tmp_path, "heart")
    assert run.id not in consents.runs_counting_on(site, tmp_path, "lung")
    consents.withdraw(site, run.id, person="Dr. North")
    assert run.id not in consents.runs_counting_on(site, own)


def test_what_was_pulled_counts_where_the_study_has_no_other_folder(site: Site) -> None:
    assert site.data_dir("lung") == site.settings.data_dir
    site.pulled_dir("lung").mkdir()
    assert site.data_dir("lung") == site.settings.state_dir / "pulled" / "lung"
    assert site.data_dir("heart") == site.settings.data_dir


def test_nothing_is_withdrawn_that_was_not_given(site: Site) -> None:
    with pytest.raises(NotFound):
        consents.withdraw(site, "RUN_999", person="Dr. North")


def test_a_consent_ends(site: Site, run: RunAnswer) -> None:
    consents.grant(site, run, person="Dr. North", check=CHECK, valid_for=timedelta(hours=1))
    with pytest.raises(Expired):
        consents.valid_consent(site, run.id, later(2))


def test_a_consent_needs_a_person_and_an_end(site: Site, run: RunAnswer) -> None:
    with pytest.raises(InvalidInput, match="name of the person"):
        consents.grant(site, run, person=" ", check=CHECK)
    with pytest.raises(InvalidInput, match="within a year"):
        consents.grant(site, run, person="Dr. North", check=CHECK, valid_for=timedelta(days=4000))


def test_a_specification_that_is_not_its_hash_is_not_signed(site: Site, run: RunAnswer) -> None:
    options = run.spec.options.model_copy(update={"local_epochs": 99})
    changed = run.model_copy(update={"spec": run.spec.model_copy(update={"options": options})})
    with pytest.raises(InvalidInput, match="not the one that its hash names"):
        consents.grant(site, changed, person="Dr. North", check=CHECK)
    assert site.store.consent(run.id) is None


def test_an_answer_waits_for_a_coordinator_that_is_away(world: World, site: Site, run: RunAnswer) -> None:
    settings = site.settings.model_copy(update={"server_address": "https://localhost:9"})
    with Site.open(settings) as cut_off:
        sent = consents.grant(cut_off, run, person="Dr. North", check=CHECK)
        assert not sent.delivered
    assert world.look(run.id).consents[0].state == "pending"
    [(item, refused)] = consents.deliver(site)
    assert (item.kind, refused) == ("consent", None)
    given = site.store.consent(run.id)
    assert given is not None
    assert given.state == "granted"
    assert consents.deliver(site) == []


def test_an_answer_that_arrived_without_its_receipt_is_not_sent_for_ever(site: Site, run: RunAnswer) -> None:
    sent = consents.grant(site, run, person="Dr. North", check=CHECK)
    assert sent.consent is not None
    site.store.set_consent_state(run.id, "sending")
    site.store.post("consent", f"/runs/{run.id}/consents", sent.consent.model_dump(mode="json"))
    [(_item, refused)] = consents.deliver(site)
    assert refused is None
    assert site.store.outbox() == []


def test_an_answer_is_sent_once_whoever_sends_it(site: Site, run: RunAnswer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's watch empties the outbox while a person consents."""
    sent: list[str] = []
    post, watching = site.gateway.post, threading.Event()

    def slowly(path: str, body: object) -> object:
        sent.append(path)
        watching.set()
        # The watch has its chance while the answer is under way: it must wait for the lock, not send the same again.
        contender.join(0.5)
        return post(path, body)

    def deliver_meanwhile() -> None:
        watching.wait(10)
        consents.deliver(site)

    contender = threading.Thread(target=deliver_meanwhile)
    monkeypatch.setattr(site.gateway, "post", slowly)
    contender.start()
    consents.grant(site, run, person="Dr. North", check=CHECK)
    contender.join(10)
    assert sent == [f"/runs/{run.id}/consents"]
    assert site.store.outbox() == []


def test_two_answers_at_the_same_moment_have_one_winner(site: Site, run: RunAnswer) -> None:
    def answer(number: int) -> bool:
        try:
            consents.grant(site, run, person=f"Dr. {number}", check=CHECK)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(answer, range(4))) == 1
    given = site.store.consent(run.id)
    assert given is not None
    assert given.state == "granted"


def test_an_answer_waits_in_an_outbox_that_another_process_does_not_give_back(
    site: Site, run: RunAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consents, "OUTBOX_PATIENCE_S", 0.1)
    with one_at_a_time(site.settings.state_dir / "outbox.lock", 1.0) as held:
        assert held
        assert not consents.grant(site, run, person="Dr. North", check=CHECK).delivered
        assert consents.deliver(site) == []
    [(item, refused)] = consents.deliver(site)
    assert (item.kind, refused) == ("consent", None)


def test_an_answer_that_the_coordinator_refuses_is_not_kept(world: World, site: Site, run: RunAnswer) -> None:
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": "test"})
    with pytest.raises(Conflict):
        consents.grant(site, run, person="Dr. North", check=CHECK)
    assert site.store.consent(run.id) is None
    assert site.store.outbox() == []


@contextmanager
def killed_before_the_outbox(site: Site) -> Iterator[None]:
    """Within it nothing can be queued for the coordinator: a process that would be killed there is."""
    with closing(sqlite3.connect(site.store.path, isolation_level=None)) as db:
        db.execute("CREATE TRIGGER killed BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'killed'); END")
        try:
            with pytest.raises(sqlite3.IntegrityError, match="killed"):
                yield
        finally:
            db.execute("DROP TRIGGER killed")


def test_an_answer_is_never_kept_without_being_queued(site: Site, run: RunAnswer) -> None:
    with killed_before_the_outbox(site):
        consents.grant(site, run, person="Dr. North", check=CHECK)
    assert site.store.consent(run.id) is None, "else nobody could answer again, and nobody would send it"
    consents.grant(site, run, person="Dr. North", check=CHECK)
    with killed_before_the_outbox(site):
        consents.withdraw(site, run.id, person="Dr. North")
    assert consents.withdraw(site, run.id, person="Dr. North").delivered


class Proxy(BaseHTTPRequestHandler):
    """Stands where the coordinator was, and answers in its place."""

    status = 502

    def do_GET(self) -> None:
        page = b"<html><body>Log in to the hospital's network.</body></html>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.mark.parametrize("status", [200, 403, 502])
def test_only_the_coordinators_no_is_a_refusal(world: World, site: Site, run: RunAnswer, status: int) -> None:
    consents.grant(site, run, person="Dr. North", check=CHECK)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (Proxy,), {"status": status})) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with Site.open(site.settings.model_copy(update={"server_address": address})) as behind:
            assert not consents.withdraw(behind, run.id, person="Dr. North").delivered
        server.shutdown()
    [(item, refused)] = consents.deliver(site)
    assert (item.kind, refused) == ("consent", None)
    assert {item.site: item.state for item in world.look(run.id).consents}["north"] == "withdrawn"


def test_a_coordinator_in_trouble_gets_everything_later_and_in_order(
    site: Site, run: RunAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as trouble:
        trouble.setattr(site.gateway, "post", raising(RemoteError("The server answered 500."), status=500))
        assert not consents.grant(site, run, person="Dr. North", check=CHECK).delivered
        assert not consents.withdraw(site, run.id, person="Dr. North").delivered
        assert consents.deliver(site) == []
    assert [refused for _item, refused in consents.deliver(site)] == [None, None]


def raising(error: MedHiveError, **data: object) -> Callable[..., None]:
    def work(*_: object) -> None:
        error.data.update(data)
        raise error

    return work


def test_a_refusal_is_heard_whoever_hears_it_first(
    world: World, site: Site, run: RunAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node delivers a withdrawal while the person who made it waits for the outbox."""
    consents.grant(site, run, person="Dr. North", check=CHECK)
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": "test"})
    outbox = consents._outbox

    def overtaken(of: Site, patience_s: float) -> AbstractContextManager[bool]:
        monkeypatch.setattr(consents, "_outbox", outbox)
        [(_item, refused)] = consents.deliver(of)
        assert isinstance(refused, Conflict)
        return outbox(of, patience_s)

    monkeypatch.setattr(consents, "_outbox", overtaken)
    with pytest.raises(Conflict, match=r"over|cancelled"):
        consents.withdraw(site, run.id, person="Dr. North")


def test_an_own_unchanged_request_is_consented_to_by_itself(world: World, site: Site, south: Site) -> None:
    request = requests.send_request(site, "heart", {"rounds": 3, "min_sites": 1}, person="Dr. North")
    run = world.approve(request.id)
    assert consents.permission(site, run) == Permission("Dr. North", f"own request {request.id}")
    assert consents.permission(south, run) == ""
    site.store.keep_request(request.id, "heart", "0" * 64, "Dr. North")
    assert "changed" in str(consents.permission(site, run))


def test_a_request_can_be_cancelled(site: Site) -> None:
    request = requests.send_request(site, "heart", {"rounds": 3}, person="Dr. North")
    assert requests.cancel_request(site, request.id, "typo").state == "cancelled"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"rounds": 10**9}, "rounds"),
        ({"strategy": "magic"}, "magic"),
        ({"rouns": 3}, "rouns"),
    ],
)
def test_senseless_requests_are_refused_by_name(site: Site, options: dict[str, object], words: str) -> None:
    with pytest.raises(MedHiveError, match=words):
        requests.send_request(site, "heart", options, person="Dr. North")


def test_a_policy_consents_within_its_bounds(world: World, site: Site, run: RunAnswer) -> None:
    policy.sign_policy(site, person="Prof. Chief", studies=("heart",), max_rounds=2, valid_for=MONTH)
    try:
        assert consents.permission(site, run) == Permission("Prof. Chief", "policy")
        longer = world.run("heart", rounds=3)
        assert consents.permission(site, longer) == "the run has 3 rounds, the policy allows 2"
    finally:
        assert policy.remove_policy(site)
    assert consents.permission(site, run) == ""


def test_a_policy_that_was_edited_or_copied_counts_for_nothing(site: Site, south: Site, run: RunAnswer) -> None:
    policy.sign_policy(site, person="Prof. Chief", studies=("heart",), max_rounds=1, valid_for=MONTH)
    path = policy.policy_path(site)
    try:
        text = path.read_text()
        path.write_text(text.replace('"max_rounds": 1,', '"max_rounds": 99,'))
        with pytest.raises(BadSignature):
            consents.permission(site, run)
        policy.policy_path(south).write_text(text)
        with pytest.raises(BadSignature):
            consents.permission(south, run)
        path.write_text("{}")
        with pytest.raises(InvalidInput, match="no policy"):
            consents.permission(site, run)
    finally:
        path.unlink()
        policy.policy_path(south).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"studies": ("lungs",)}, "does not name the study"),
        ({"max_local_epochs": 1}, "local epochs"),
        ({"min_sites": 5}, "at least 5 sites"),
        ({"strategies": ("krum",)}, "does not name the strategy"),
    ],
)
def test_each_bound_of_a_policy_holds(site: Site, run: RunAnswer, bounds: dict[str, object], words: str) -> None:
    values = {"studies": ("heart",), "max_rounds": 10, **bounds}
    body = policy.sign_policy(site, person="Prof. Chief", valid_for=MONTH, **values).body  # type: ignore[arg-type]
    policy.remove_policy(site)
    assert words in (policy.objection(body, run.spec, later(0)) or "")
    assert policy.objection(body, run.spec, later(24 * 31)) == "the policy is not valid now"


def test_a_policy_must_end(site: Site) -> None:
    with pytest.raises(InvalidInput, match="within a year"):
        policy.sign_policy(site, person="x", studies=("heart",), max_rounds=1, valid_for=timedelta(days=999))
    with pytest.raises(InvalidInput, match="max_rounds"):
        policy.sign_policy(site, person="x", studies=("heart",), max_rounds=0, valid_for=MONTH)


def test_waiting_has_an_end() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        wait_for(lambda: False, "nothing", 0.01)
