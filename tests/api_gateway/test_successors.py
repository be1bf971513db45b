"""A successor of the CA and of the coordinator's key: in steps of which a process may be killed in each."""

import asyncio
import os
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count, cycle
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from fastapi import FastAPI

from api_gateway import events, signing_key, sites
from api_gateway.__main__ import build
from api_gateway.app import create_app
from api_gateway.renewal import Renewal
from api_gateway.settings import Settings
from api_gateway.tls import Authority, CaStep, ServedCertificate, load_certificate
from api_gateway.work import ANYBODY, Call, Gateway
from fl_client.identity import Invite
from medhive.errors import BadSignature, Conflict, InvalidInput
from medhive.introduction import known_key_ids, present_key
from medhive.signing import SigningKey
from medhive.wire import API, MAX_SUCCESSIONS, CoordinatorAnswer, NewInvite

NAME = "Test"
DAY = timedelta(days=1)
LIFE, OVERLAP = 1000 * DAY, 100 * DAY
NOW = datetime.now(UTC)
KILLED = 9


def killed_at_each_file(step: Callable[[], object]) -> Iterator[int]:
    """Do a step in processes of which the first dies before its first change of a file, the next before its second, ...

    Yields after each death; the caller looks at what is left, and the step begins anew there.
    """
    for allowed in count():
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            with pytest.MonkeyPatch.context() as patch:
                left = count(allowed, -1)
                for owner, name in ((os, "link"), (Path, "replace"), (Path, "unlink")):
                    patch.setattr(owner, name, mortal(getattr(owner, name), left))
                try:
                    step()
                finally:
                    os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != KILLED:
            return
        yield allowed


def mortal(change: Callable[..., object], left: Iterator[int]) -> Callable[..., object]:
    def changed(*args: object, **named: object) -> object:
        if next(left) <= 0:
            os._exit(KILLED)
        return change(*args, **named)

    return changed


def advanced(folder: Path, now: datetime) -> Authority:
    """What a look at this moment makes of it."""
    authority = Authority.open(folder, NAME, LIFE)
    while step := authority.due(now, OVERLAP):
        authority = authority.take(step, folder, NAME, now, LIFE)
    return authority


def test_a_ca_is_followed_by_another_that_was_known_for_long(tmp_path: Path) -> None:
    first = advanced(tmp_path, NOW)
    assert first.trusted == (first.certificate,)
    assert advanced(tmp_path, NOW + LIFE - 2 * OVERLAP - DAY).trusted == first.trusted
    announced = advanced(tmp_path, NOW + LIFE - 2 * OVERLAP + DAY)
    assert announced.certificate == first.certificate and announced.successor is not None
    began = NOW + LIFE - 2 * OVERLAP + DAY
    assert advanced(tmp_path, began + OVERLAP - DAY).trusted == announced.trusted
    took_over = advanced(tmp_path, began + OVERLAP + DAY)
    assert (took_over.certificate, took_over.successor) == (announced.successor, None)
    assert took_over.former == (first.certificate,)
    assert not (tmp_path / "ca-next.key").exists()
    assert advanced(tmp_path, began + 2 * OVERLAP - 2 * DAY).trusted == took_over.trusted
    alone = advanced(tmp_path, began + 2 * OVERLAP + DAY)
    assert alone.trusted == (took_over.certificate,)
    assert alone.ensure_leaf(tmp_path, "server", ("gateway",), NOW)
    assert alone.issued(load_certificate(tmp_path / "server.crt")) and not first.issued(
        load_certificate(tmp_path / "server.crt")
    )


def test_a_ca_that_ended_while_nobody_looked_is_replaced_at_once(tmp_path: Path) -> None:
    first = advanced(tmp_path, NOW)
    later = advanced(tmp_path, NOW + LIFE + DAY)
    assert later.certificate != first.certificate


@pytest.mark.parametrize("step", list(CaStep))
def test_a_step_of_the_ca_survives_a_kill_before_each_change(tmp_path: Path, step: CaStep) -> None:
    authority = Authority.open(tmp_path, NAME, LIFE)
    for earlier in list(CaStep)[: list(CaStep).index(step)]:
        authority = authority.take(earlier, tmp_path, NAME, NOW, LIFE)
    trusted = set(authority.trusted)
    deaths = 0
    for _ in killed_at_each_file(lambda: Authority.open(tmp_path, NAME, LIFE).take(step, tmp_path, NAME, NOW, LIFE)):
        deaths += 1
        found = Authority.open(tmp_path, NAME, LIFE)
        assert found.certificate in trusted
        assert trusted <= set(found.trusted) or step is CaStep.DROP
        assert found.ensure_leaf(tmp_path, f"leaf{deaths}", ("here",), NOW)
        if found.trusted != authority.trusted or found.successor != authority.successor:
            break  # it is done, and a second time would be another step
    assert deaths


def test_a_bundle_that_does_not_fit_its_key_is_refused(tmp_path: Path) -> None:
    Authority.open(tmp_path / "one", NAME)
    Authority.open(tmp_path / "two", NAME)
    (tmp_path / "one" / "ca.crt").write_bytes((tmp_path / "two" / "ca.crt").read_bytes())
    with pytest.raises(InvalidInput, match="holds no certificate for"):
        Authority.open(tmp_path / "one", NAME)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bytes:
    """Connect in memory; returns the certificate that the client was shown."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for end in ends * 4:
        with suppress(ssl.SSLWantReadError):  # until the other end has said something
            end.do_handshake()
    shown = ends[0].getpeercert(binary_form=True)
    assert shown
    return shown


def test_a_certificate_changes_while_others_connect(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path, NAME)
    pairs = [(tmp_path / f"{name}.crt", tmp_path / f"{name}.key") for name in ("one", "two")]
    for certificate, _ in pairs:
        authority.ensure_leaf(tmp_path, certificate.stem, (), NOW)
    expected = [load_certificate(path).public_bytes(Encoding.DER) for path, _ in pairs]
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.create_default_context(cafile=str(tmp_path / "ca.crt")),
    )
    server.load_cert_chain(*pairs[0])
    served = ServedCertificate(server)
    names = ("localhost", "127.0.0.1")  # a client that knows an address only names no host
    assert [handshake(server, client, name) for name in names] == [expected[0]] * 2
    served.change(*pairs[1])
    assert [handshake(server, client, name) for name in names] == [expected[1]] * 2
    with ThreadPoolExecutor() as pool:
        connecting = pool.submit(lambda: {handshake(server, client, names[turn % 2]) for turn in range(500)})
        for pair in cycle(pairs):
            served.change(*pair)
            if connecting.done():
                break
        assert connecting.result() <= set(expected)
    with pytest.raises(OSError, match="mismatch"):
        served.change(pairs[0][0], pairs[1][1])
    assert handshake(server, client, names[0]) in expected


def test_whoever_knows_an_old_key_is_led_to_the_present_one(tmp_path: Path) -> None:
    first, none = signing_key.open_key(tmp_path)
    assert none == ()
    second = signing_key.roll(tmp_path, NOW)
    third = signing_key.roll(tmp_path, NOW)
    key, successions = signing_key.open_key(tmp_path)
    assert key.public == third.public and len(successions) == 2
    assert present_key(first.public, successions) == present_key(second.public, successions) == key.public
    assert known_key_ids(key.public, successions) == (key.public.key_id, second.public.key_id, first.public.key_id)
    stranger = SigningKey.generate().public
    assert present_key(stranger, successions) == stranger
    forged = [each.model_copy(update={"signature": successions[0].signature}) for each in successions]
    with pytest.raises(BadSignature):
        known_key_ids(key.public, forged)


def test_a_roll_of_the_key_survives_a_kill_before_each_change(tmp_path: Path) -> None:
    first, _ = signing_key.open_key(tmp_path)
    deaths = 0
    for _ in killed_at_each_file(lambda: signing_key.roll(tmp_path, NOW)):
        deaths += 1
        seen = signing_key.present(tmp_path, b"")  # by a gateway that serves, and mends nothing
        key, successions = signing_key.open_key(tmp_path)
        assert present_key(first.public, successions) == key.public
        assert (seen[0].public, seen[1]) == (key.public, successions) if seen else not successions
        assert first.public.key_id in known_key_ids(key.public, successions)
        assert not (tmp_path / signing_key.NEXT_KEY).exists()
    assert deaths >= 3


def test_no_more_than_hospitals_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SUCCESSIONS > 2
    monkeypatch.setattr(signing_key, "MAX_SUCCESSIONS", 1)
    signing_key.roll(tmp_path, NOW)
    with pytest.raises(Conflict, match="all that hospitals follow"):
        signing_key.roll(tmp_path, NOW)


async def introduction_of(app: FastAPI) -> CoordinatorAnswer:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://gateway") as client:
        return CoordinatorAnswer.model_validate_json((await client.get(f"{API}/coordinator")).content)


def test_who_asks_is_shown_what_another_gateway_has_only_just_changed(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "state")
    (one, _), (two, _) = build(settings), build(settings)
    former = one.key.public
    renewal, other = Renewal(one), create_app(two)  # without its background tasks: of itself it would never look
    renewal.renew_ca()
    renewal.renew_key()
    answer = asyncio.run(introduction_of(other))
    assert answer.key_id == one.key.public.key_id != former.key_id
    assert len(answer.introduction.verify(one.key.public).authorities) == 2
    one.database.close()
    two.database.close()


@contextmanager
def two_gateways(folder: Path) -> Iterator[tuple[Gateway, Gateway]]:
    """On one database and one folder, without the tasks that would look for changes."""
    settings = Settings(state_dir=folder / "state")
    (one, _), (two, _) = build(settings), build(settings)
    yield one, two
    one.database.close()
    two.database.close()


def test_another_gateway_signs_nothing_with_a_key_that_has_a_successor(tmp_path: Path) -> None:
    with two_gateways(tmp_path) as (one, two):
        former = two.key.public.key_id
        Renewal(one).renew_key()
        present = one.key.public.key_id
        assert two.key.public.key_id == former != present, "it has not looked yet"
        with two.system_write() as work:
            token = sites.invite(work, NewInvite(site="north")).token
            assert two.key_ids == (present, former), "what a hospital signs to the new key counts here too"
        assert Invite.parse(str(token)).coordinator_key.key_id == present
        Renewal(one).renew_key()
        with Call(two, server_token(one), "test").read(*ANYBODY) as work:
            head = events.signed_head(work.session, two.key, work.now)
        assert head.key_id == one.key.public.key_id not in {present, former}


def server_token(gateway: Gateway) -> str:
    """The aggregator's, which the state folder holds."""
    return (gateway.state.folder / "secrets" / "server-token").read_text("utf-8")


def test_a_key_changes_only_after_what_is_being_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    roll = signing_key.roll
    monkeypatch.setattr(signing_key, "roll", lambda *words: (done.append("changed"), roll(*words)))
    with two_gateways(tmp_path) as (one, two), ThreadPoolExecutor() as threads:
        with two.system_write() as work:
            key = work.gateway.key
            rolling = threads.submit(Renewal(one).renew_key)
            wait([rolling], timeout=0.5)  # all the time that it would need
            two.follow_key()
            assert two.key.public == key.public
            done.append("about to commit")
        rolling.result(60)
        assert done == ["about to commit", "changed"]
