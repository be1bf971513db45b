"""One gateway a database for all tests of the gateway's contract."""

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from gateway_world import World, missing_postgres, postgres_server, running_gateway
from psycopg import sql

# Short, so that a dead holder's run can be taken up within a test.
LEASE_S = "1.5"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server, by the URL of its first database."""
    reason = missing_postgres()
    if reason:
        pytest.skip(reason)
    with postgres_server() as url:
        yield url


@pytest.fixture
def empty_postgres(postgres_url: str) -> str:
    """The URL of a database of a test's own."""
    return empty_database(postgres_url)


def empty_database(server: str) -> str:
    """Make a database that no gateway has seen; a session's world may be made more than once. Returns its URL."""
    name = f"gateway_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A gateway process over TLS with everybody who uses it, once on each database."""
    settings = {"lease_s": LEASE_S}
    if request.param == "postgres":
        settings["database_url"] = empty_database(request.getfixturevalue("postgres_url"))
    folder = tmp_path_factory.mktemp(f"gateway-{request.param}")
    with running_gateway(folder / "state", **settings) as gateway:
        world = World(gateway, folder)
        yield world
        world.close()
