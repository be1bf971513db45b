"""Whatever the OpenAPI description allows may be sent, by whomever: the gateway never answers with a failure of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
from gateway_world import World, missing_postgres, postgres_server, running_gateway
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from medhive.version import PROTOCOL, PROTOCOL_HEADER
from medhive.wire import API

EXAMPLES = 6
"""Of each operation on each database, each sent by four callers: a minute in all."""
TAGS = ("identity", "sites", "studies", "runs", "blobs", "versions", "queues", "events", "health")
# What ends a caller's rights would leave nothing to test; each of these has tests of its own.
LEFT_ALONE = ("/logout", "/revoke", "/leave", "/revoke-tokens", "/accounts/{username}", "/accounts/{username}/password")


class Target:
    """A gateway of its own, with real objects to fill into paths, and one session for each caller."""

    def __init__(self, world: World, ca_file: Path) -> None:
        hospital = world.hospital()
        study = world.study(hospital)
        world.released(study, hospital)
        run = world.ready(study, hospital)
        world.started(run)
        request = world.admin.post(f"{API}/requests", {"study": study})
        world.admin.put(f"{API}/studies/{study}/queue", {})
        self.url = world.gateway.url
        self.ca_file = str(ca_file)
        self.names = {"study": study, "site": hospital.site, "run_id": run.id, "request_id": request["id"]}
        self.names |= {"version": 1, "number": 1}
        site_token = hospital.http.headers["Authorization"].partition(" ")[2]
        self.tokens = [None, world.admin_token, world.gateway.server_token, site_token]
        self.session = requests.Session()
        with world.gateway.http() as http:
            self.description = http.get(f"{self.url}/api/openapi.json").json()

    def headers(self, token: str | None) -> dict[str, str]:
        known = {PROTOCOL_HEADER: str(PROTOCOL)}
        return known | ({"Authorization": f"Bearer {token}"} if token else {})


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    if request.param == "postgres":
        reason = missing_postgres()
        if reason:
            pytest.skip(reason)
        with postgres_server() as url, running_gateway(folder / "state", database_url=url) as gateway:
            yield from _target(World(gateway, folder))
    else:
        with running_gateway(folder / "state") as gateway:
            yield from _target(World(gateway, folder))


def _target(world: World) -> Iterator[Target]:
    target = Target(world, world.gateway.state_dir / "tls" / "ca.crt")
    yield target
    target.session.close()
    world.close()


@pytest.mark.parametrize("tag", TAGS)
def test_nothing_makes_it_fail(target: Target, tag: str) -> None:
    tried = 0
    for result in schemathesis.openapi.from_dict(target.description).get_all_operations():
        operation = result.ok()
        if tag in operation.tags and not operation.path.endswith(LEFT_ALONE):
            fuzz(target, operation)
            tried += 1
    assert tried


def test_every_operation_has_a_tag(target: Target) -> None:
    for result in schemathesis.openapi.from_dict(target.description).get_all_operations():
        assert set(result.ok().tags) & set(TAGS)


def fuzz(target: Target, operation: schemathesis.APIOperation) -> None:
    """Send what the operation's description allows, and what it does not, as each caller."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def send(case: schemathesis.Case) -> None:
        for name in (case.path_parameters or {}).keys() & target.names.keys():
            case.path_parameters[name] = target.names[name]
        for token in target.tokens:
            require_no_failure(target, case, token)

    send()


def require_no_failure(target: Target, case: schemathesis.Case, token: str | None) -> None:
    """Send one case as one caller: below 500, and a problem document when refused."""
    answer = case.call(
        base_url=target.url,
        headers=target.headers(token),
        session=target.session,
        verify=target.ca_file,
        timeout=30,
    )
    assert answer.status_code < 500, (case.method, case.path, answer.status_code, answer.text[:300])
    if answer.status_code >= 400 and case.method.upper() != "HEAD":
        assert answer.headers["content-type"] == ["application/problem+json"], answer.text[:300]
