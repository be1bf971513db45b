"""Who may look at MLflow: what the proxy is told by the gateway."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_world import World, running_gateway


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("tracking")
    with running_gateway(folder / "state") as gateway:
        world = World(gateway, folder)
        yield world
        world.close()


def status(world: World, *login: str) -> int:
    with world.gateway.http() as http:
        url = f"{world.gateway.url}/internal/mlflow-access"
        answer = http.get(url, auth=httpx.BasicAuth(*login) if login else None)
        assert answer.status_code != 401 or answer.headers["WWW-Authenticate"].startswith("Basic ")
        return answer.status_code


def account(world: World, role: str, **more: str) -> tuple[str, str]:
    name = world.name(role)
    with world.gateway.http(world.admin_token) as http:
        answer = http.post("/accounts", json={"username": name, "role": role, **more})
        return name, str(answer.raise_for_status().json()["password"])


def test_admins_and_analysts_may_look(world: World) -> None:
    login = account(world, "analyst")
    # The second time it is remembered.
    assert [status(world, *login), status(world, *login)] == [204, 204]
    assert status(world, "admin", world.gateway.password) == 204


def test_without_the_right_password_nobody_may(world: World) -> None:
    name, _ = account(world, "analyst")
    assert status(world) == 401
    assert status(world, name, "not-the-password") == 401
    assert status(world, "nobody", "not-the-password") == 401


def test_a_hospitals_people_may_not(world: World) -> None:
    hospital = world.hospital()
    assert status(world, *account(world, "site", site=hospital.site)) == 403
