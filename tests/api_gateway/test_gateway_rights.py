"""Each route asks for the role and for the object: who may do what, as one table."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from gateway_world import Hospital, World
from queue_world import agree, open_queue

from medhive.signing import sign
from medhive.wire import API, LeaveBody, RunAnswer, VersionAnswer

ROLES = ("nobody", "admin", "analyst", "server", "member", "stranger")
OPEN = "nobody admin analyst server member stranger"
KNOWN = "admin analyst server member stranger"
STUDY = "admin analyst server member"
READERS = "admin analyst"
DIGEST = "a" * 64

# method, path, who is let in. Whoever is let in may still be told that his body is wrong (422), that the state does not
# permit it (409) or that another's signature is needed (403 bad-signature); who is not, gets 401, 403 or 404.
TABLE = [
    ("GET", "/coordinator", OPEN),
    ("GET", "/tunnel", READERS),
    ("POST", "/login", OPEN),
    ("POST", "/join", OPEN),
    ("POST", "/site-token", OPEN),
    ("GET", "/accounts", "admin"),
    ("POST", "/accounts", "admin"),
    ("DELETE", "/accounts/missing", "admin"),
    ("POST", "/accounts/missing/password", "admin"),
    ("POST", "/accounts/missing/revoke-tokens", "admin"),
    ("GET", "/invites", READERS),
    ("POST", "/invites", "admin"),
    ("DELETE", "/invites/999999", "admin"),
    ("GET", "/sites", KNOWN),
    ("GET", "/sites/{site}", STUDY),
    ("POST", "/sites/{site}/revoke", "admin"),
    ("POST", "/sites/{site}/leave", "member"),
    ("GET", "/studies", KNOWN),
    ("POST", "/studies", "admin"),
    ("GET", "/studies/{study}", STUDY),
    ("PUT", "/studies/{study}/members/missing", "admin"),
    ("DELETE", "/studies/{study}/members/missing", "admin"),
    ("GET", "/requests", KNOWN),
    ("POST", "/requests", "admin member stranger"),
    ("GET", "/requests/{request}", STUDY),
    ("POST", "/requests/{request}/approve", "admin"),
    ("POST", "/requests/{request}/reject", "admin"),
    ("POST", "/requests/{request}/cancel", "admin"),
    ("GET", "/runs", KNOWN),
    ("GET", "/runs/{run}", STUDY),
    ("GET", "/runs/{run}/rounds", STUDY),
    ("GET", "/runs/{run}/rounds.csv", READERS),
    ("POST", "/runs/{run}/stop", "admin"),
    ("GET", "/runs/{run}/consents", STUDY),
    ("POST", "/runs/{run}/consents", "member"),
    ("POST", "/runs/{run}/withdraw", "member"),
    ("POST", "/runs/{run}/activity", "member"),
    ("HEAD", "/runs/{run}/blobs/{blob}", "server member"),
    ("GET", "/runs/{run}/blobs/{blob}", "server member"),
    ("PUT", "/runs/{run}/blobs/{blob}", "server member"),
    ("GET", "/studies/{study}/versions", STUDY),
    ("GET", "/studies/{study}/versions/1", STUDY),
    ("GET", "/studies/{study}/versions/1/manifest", STUDY),
    ("GET", "/studies/{study}/versions/1/file", STUDY),
    ("HEAD", "/studies/{study}/versions/1/file", STUDY),
    ("GET", "/studies/{study}/compare?a=1&b=1", STUDY),
    ("POST", "/studies/{study}/versions/1/offer", "admin"),
    ("POST", "/studies/{study}/versions/1/export", "admin"),
    ("POST", "/studies/{study}/versions/1/decisions", "member"),
    ("GET", "/statistics", READERS),
    ("POST", "/cleanup", "admin"),
    ("GET", "/events", KNOWN),
    ("GET", "/events/head", KNOWN),
    ("POST", "/events/countersign", "member stranger"),
    ("GET", "/events/countersignatures", READERS),
    ("GET", "/server/nodes", "server"),
    ("PUT", "/server/nodes/{site}", "server"),
    ("POST", "/server/lease", "server"),
    ("POST", "/server/runs/{run}/heartbeat", "server"),
    ("POST", "/server/runs/{run}/start", "server"),
    ("PUT", "/server/runs/{run}/rounds/1", "server"),
    ("POST", "/server/runs/{run}/version-zero", "server"),
    ("POST", "/server/runs/{run}/end", "server"),
    ("POST", "/server/runs/{run}/mlflow", "server"),
    ("GET", "/studies/{study}/queue", STUDY),
    ("PUT", "/studies/{study}/queue", "admin"),
    ("POST", "/studies/{study}/queue/close", "admin"),
    ("POST", "/studies/{study}/queue/consents", "member"),
    ("POST", "/studies/{study}/queue/execute", "admin"),
    ("POST", "/studies/{study}/queue/clear", "admin"),
    ("GET", "/studies/{study}/queue/executions", STUDY),
    ("GET", "/studies/{study}/queue/contributions", STUDY),
    ("HEAD", "/studies/{study}/queue/version-zero/blobs/{blob}", "member"),
    ("PUT", "/studies/{study}/queue/version-zero/blobs/{blob}", "member"),
    ("POST", "/server/queue/lease", "server"),
    ("POST", "/server/queue/executions/1/look", "server"),
    ("POST", "/server/queue/executions/1/end", "server"),
    ("HEAD", "/server/queue/executions/1/blobs/{blob}", "server"),
    ("GET", "/server/queue/executions/1/blobs/{blob}", "server"),
    ("PUT", "/server/queue/executions/1/blobs/{blob}", "server"),
    ("POST", "/logout", KNOWN),
]
REFUSED = {401: "not-authenticated", 403: "not-allowed", 404: "not-found"}


@dataclass
class Scene:
    """A study with a finished run, its member, a stranger, and a connection for each role."""

    world: World
    member: Hospital
    stranger: Hospital
    names: dict[str, str]
    clients: dict[str, httpx.Client]


@pytest.fixture(scope="session")
def scene(world: World) -> Iterator[Scene]:
    """Made once: refusals change nothing, and whoever is let in sends a body that changes nothing."""
    member, stranger = world.hospital(), world.hospital()
    study = world.study(member)
    version = world.released(study, member, seed=77)
    run = world.ready(study, member)
    request = world.admin.post(f"{API}/requests", {"study": study})
    agree(member, open_queue(world, study))
    analyst = world.name("analyst")
    password = world.admin.post(f"{API}/accounts", {"username": analyst, "role": "analyst"})["password"]
    tokens = {
        "nobody": None,
        "admin": world.admin_token,
        "analyst": world.login(analyst, password),
        "server": world.gateway.server_token,
        "member": member.http.headers["Authorization"].partition(" ")[2],
        "stranger": stranger.http.headers["Authorization"].partition(" ")[2],
    }
    path, digest = world.weights(seed=78)
    world.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
    names = {"site": member.site, "study": study, "request": request["id"], "run": run.id, "blob": digest}
    assert version.version == 1
    clients = {role: world.gateway.http(token) for role, token in tokens.items()}
    yield Scene(world, member, stranger, names, clients)
    for client in clients.values():
        client.close()
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": "the test is over"})


def test_every_route_stands_in_the_table(world: World) -> None:
    with world.gateway.http() as http:
        paths = http.get(f"{world.gateway.url}/api/openapi.json").json()["paths"]
    served = {
        (method.upper(), path.removeprefix(API).replace("{number}", "1"))
        for path, methods in paths.items()
        if path.startswith(API)
        for method in methods
    }
    assert len(served) == len(
        {(method, path.partition("?")[0]) for method, path, _ in TABLE} - {("HEAD", "/studies/{study}/versions/1/file")}
    )


@pytest.mark.parametrize(("method", "path", "allowed"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_role_and_object(scene: Scene, method: str, path: str, allowed: str) -> None:
    for role in ROLES:
        if path == "/logout" and role != "nobody":
            continue  # it would end the role's own token; tested on its own
        answer = _with_valid_body(scene, scene.clients[role], method, path, role)
        if role in allowed.split():
            assert answer.status_code not in (401, 500), (role, answer.text)
            assert not (answer.status_code == 403 and answer.json()["type"].endswith("not-allowed")), (
                role,
                answer.text,
            )
        else:
            assert answer.status_code in REFUSED, (role, answer.status_code, answer.text)
            assert (answer.status_code == 401) == (role == "nobody")
            if method != "HEAD":
                assert answer.json()["type"] == f"urn:medhive:error:{REFUSED[answer.status_code]}"


def _with_valid_body(scene: Scene, http: httpx.Client, method: str, path: str, role: str) -> httpx.Response:
    """Send what would be valid from somebody else, so that what refuses is the right and not the body."""
    filled = path.format(**scene.names)
    if method == "PUT" and "/blobs/" in path:
        return http.put(filled, content=b"x", headers={"Content-Range": "bytes 0-0/2"})
    allowed = next(row[2] for row in TABLE if row[0] == method and row[1] == path)
    if role in allowed.split() or (body := _body(scene, path)) is None:
        return http.request(method, filled, content=b"" if method in ("POST", "PUT") else None)
    return http.request(method, filled, json=body)


def _body(scene: Scene, path: str) -> object:
    run = RunAnswer.model_validate(scene.world.admin.get(f"{API}/runs/{scene.names['run']}"))
    version = VersionAnswer.model_validate(scene.world.admin.get(f"{API}/studies/{scene.names['study']}/versions/1"))
    now = run.created_at.isoformat()
    consent = scene.member.consent(run).model_dump(mode="json")
    bodies: dict[str, object] = {
        "/accounts": {"username": "x", "role": "analyst"},
        "/accounts/missing/password": {},
        "/invites": {"site": "x"},
        "/studies": {"name": "x", "task": "image-folder", "data": {"classes": ["a", "b"]}},
        "/requests": {"study": scene.names["study"]},
        "/runs/{run}/consents": consent,
        "/runs/{run}/withdraw": consent,
        "/runs/{run}/activity": {"round": 1, "activity": "training"},
        "/studies/{study}/versions/1/export": {"site": scene.member.site},
        "/studies/{study}/versions/1/decisions": scene.member.decision(version, "accepted").model_dump(mode="json"),
        "/cleanup": {},
        "/events/countersign": _countersignature(scene),
        "/sites/{site}/leave": sign(
            LeaveBody(site=scene.member.site, coordinator_key_id="0" * 16, issued_at=run.created_at), scene.member.key
        ).model_dump(mode="json"),
        "/studies/{study}/queue": {},
        "/studies/{study}/queue/consents": consent,
        "/server/queue/lease": {"holder": "x"},
        "/server/queue/executions/1/look": {"fence": 0},
        "/server/queue/executions/1/end": {"fence": 0, "state": "failed", "newest_version": 0},
        "/server/nodes/{site}": {},
        "/server/lease": {"holder": "x"},
        "/server/runs/{run}/heartbeat": {"fence": 0},
        "/server/runs/{run}/start": {"fence": 0},
        "/server/runs/{run}/rounds/1": {"fence": 0, "state": "open", "opened_at": now},
        "/server/runs/{run}/version-zero": {"fence": 0, "digest": DIGEST},
        "/server/runs/{run}/end": {"fence": 0, "state": "failed"},
        "/server/runs/{run}/mlflow": {"mlflow_run_id": "x"},
    }
    if path in bodies:
        return bodies[path]
    return (
        {"reason": ""}
        if path.rsplit("/", maxsplit=1)[-1] in ("revoke", "approve", "reject", "cancel", "stop", "close", "clear")
        else None
    )


def _countersignature(scene: Scene) -> object:
    body = {"site": scene.member.site, "number": 1, "hash": DIGEST, "seen_at": "2026-01-01T00:00:00Z"}
    return {"body": body, "key_id": "0" * 16, "signature": ""}


def test_logout_ends_the_token(world: World) -> None:
    name = world.name("analyst")
    password = world.admin.post(f"{API}/accounts", {"username": name, "role": "analyst"})["password"]
    with world.gateway.http(world.login(name, password)) as http:
        assert http.get("/studies").status_code == 200
        assert http.post("/logout").status_code == 204
        assert http.get("/studies").status_code == 401
