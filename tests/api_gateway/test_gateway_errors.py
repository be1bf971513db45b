"""Every refusal has a status, every answer to nonsense is a problem document."""

import importlib
import pkgutil

import pytest
from gateway_world import World

import api_gateway
import medhive
from api_gateway.auth import hash_password, password_fits
from api_gateway.errors import STATUS, known_code
from api_gateway.http import MAX_JSON_BYTES
from medhive import client, errors
from medhive.errors import MedHiveError
from medhive.version import PROTOCOL
from medhive.wire import API

JSON = {"Content-Type": "application/json"}


def every_error() -> set[type[MedHiveError]]:
    """All error classes that this service or the core can raise."""
    for package in (medhive, api_gateway):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".admin" not in module.name and not module.name.endswith(("__main__", ".env")):
                importlib.import_module(module.name)
    found, waiting = set(), [MedHiveError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    return {kind for kind in found if kind.__module__.partition(".")[0] in ("medhive", "api_gateway")}


def test_every_error_has_a_status() -> None:
    kinds = every_error()
    assert {kind.__name__ for kind in kinds} >= {
        "NoSpace",
        "CorruptWeights",
        "UnknownStrategy",
        "TooManyAttempts",
        "Unavailable",
    }
    for kind in kinds:
        assert 400 <= STATUS[known_code(kind)] < 600
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, MedHiveError):
            assert value.code in STATUS, f"{value.__name__} has no row of its own"


def test_what_is_sent_is_what_the_client_knows() -> None:
    sent = {known_code(kind) for kind in every_error()}
    own = {"corrupt-weights", "wrong-layout", "not-finite", "norm-too-large"}
    assert sent - own <= set(client.KNOWN_ERRORS)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"username": NaN, "password": "x"}',
        b'{"username": 1e999, "password": "x"}',
        b'{"username": "\\ud800", "password": "x"}',
        b'{"username": "x", "password": "\\u0000"}',
        b'{"username": "x", "password": "x", "more": 1}',
        b'{"username": "x\\n", "password": "x"}',
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b"1" * 10_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_nonsense_is_a_problem(world: World, body: bytes) -> None:
    with world.gateway.http() as http:
        answer = http.post("/login", content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:medhive:error:invalid-input"


def test_bodies_have_a_limit(world: World) -> None:
    with world.gateway.http() as http:
        assert http.post("/login", content=b" " * (MAX_JSON_BYTES + 1), headers=JSON).status_code == 413
        chunks = iter([b" " * 65536] * 20)
        assert http.post("/login", content=chunks, headers=JSON).status_code == 413


def test_what_is_not_there_is_a_problem_too(world: World) -> None:
    with world.gateway.http(world.admin_token) as http:
        for method, path, status in [
            ("GET", "/nowhere", 404),
            ("PATCH", "/studies", 405),
            ("GET", "/runs/RUN_0", 422),
            ("GET", "/runs/RUN_99999999999", 404),
            ("GET", "/runs/7", 422),
            ("GET", "/studies/%00", 422),
            ("GET", "/studies/x/versions/99999999999", 422),
            ("GET", "/runs?changed_after=0001-01-01T00:00:00%2B14:00", 200),
            ("GET", "/events?after=99999999999999999999", 422),
        ]:
            answer = http.request(method, path)
            assert answer.status_code == status, (path, answer.text)
            if status >= 400:
                assert answer.headers["Content-Type"] == "application/problem+json"
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "9" * 30}
        with http.stream("GET", "/events", headers=headers) as stream:
            assert stream.status_code == 200


def test_answers_carry_the_version_and_are_not_cached(world: World) -> None:
    with world.gateway.http() as http:
        answer = http.get("/coordinator")
    assert answer.headers["MedHive-Protocol"] == str(PROTOCOL) and answer.headers["Cache-Control"] == "no-store"


def test_a_proxy_is_believed_only_when_named(world: World) -> None:
    with world.gateway.http(world.admin_token) as http:
        http.headers["X-Forwarded-For"] = "203.0.113.9"
        study = world.study(world.hospital())
        answer = http.post("/requests", json={"study": study})
    assert answer.json()["source_address"] == "127.0.0.1"


def test_passwords() -> None:
    hashed = hash_password("a good password")
    assert password_fits(hashed, "a good password")
    assert not password_fits(hashed, "another")
    assert not password_fits(None, "a good password")
    assert not password_fits("no hash", "a good password")


def test_accounts_from_making_to_disabling(world: World) -> None:
    hospital = world.hospital()
    name = world.name("person")
    made = world.admin.post(f"{API}/accounts", {"username": name, "role": "site", "site": hospital.site})
    token = world.login(name, made["password"])
    with world.gateway.client(token) as person:
        assert person.get(f"{API}/sites")[0]["name"] == hospital.site
        changed = person.post(f"{API}/accounts/{name}/password", {"password": "a better password"})
        assert changed["password"] is None
        with pytest.raises(errors.NotAuthenticated):
            person.get(f"{API}/sites")
        with pytest.raises(errors.NotAuthenticated):
            world.login(name, made["password"])
        person.use_token(world.login(name, "a better password"))
        with pytest.raises(errors.NotAllowed):
            person.post(f"{API}/accounts/admin/password", {"password": None})
        world.admin.post(f"{API}/accounts/{name}/revoke-tokens")
        with pytest.raises(errors.NotAuthenticated):
            person.get(f"{API}/sites")
    world.admin.delete(f"{API}/accounts/{name}")
    with pytest.raises(errors.NotAuthenticated):
        world.login(name, "a better password")
    listed = {row["username"]: row for row in world.admin.get(f"{API}/accounts")}
    assert listed[name]["disabled"] and listed[name]["password"] is None
    with pytest.raises(errors.Conflict, match="last admin"):
        world.admin.delete(f"{API}/accounts/admin")
    with pytest.raises(errors.Conflict):
        world.admin.post(f"{API}/accounts", {"username": name, "role": "analyst"})
    with pytest.raises(errors.InvalidInput):
        world.admin.post(f"{API}/accounts", {"username": world.name("x"), "role": "site"})
    with pytest.raises(errors.NotFound):
        world.admin.post(f"{API}/accounts", {"username": world.name("x"), "role": "site", "site": "nowhere"})


def test_a_study_is_checked(world: World) -> None:
    body = {"name": world.name("study"), "task": "image-folder", "data": {"classes": ["a", "b"]}}
    with pytest.raises(errors.InvalidInput, match="columns"):
        world.admin.post(f"{API}/studies", {**body, "task": "tabular"})
    with pytest.raises(errors.InvalidInput, match="rounds"):
        world.admin.post(f"{API}/studies", {**body, "defaults": {"rounds": 0}})
    with pytest.raises(errors.NotFound):
        world.admin.post(f"{API}/studies", {**body, "members": ["nowhere"]})
    world.admin.post(f"{API}/studies", body)
    with pytest.raises(errors.Conflict):
        world.admin.post(f"{API}/studies", body)
