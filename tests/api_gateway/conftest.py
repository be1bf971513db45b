"""One gateway a database for all tests of the gateway's contract."""

from collections.abc import Iterator

import pytest
from gateway_world import World, missing_postgres, postgres_server, running_gateway

# Short, so that a dead holder's run can be taken up within a test.
LEASE_S = "1.5"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL database."""
    reason = missing_postgres()
    if reason:
        pytest.skip(reason)
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A gateway process over TLS with everybody who uses it, once on each database."""
    settings = {"lease_s": LEASE_S}
    if request.param == "postgres":
        settings["database_url"] = request.getfixturevalue("postgres_url")
    folder = tmp_path_factory.mktemp(f"gateway-{request.param}")
    with running_gateway(folder / "state", **settings) as gateway:
        world = World(gateway, folder)
        yield world
        world.close()
