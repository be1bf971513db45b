"""One coordinator with three hospitals for the integration tests: real processes, started once, ended with the session."""

from collections.abc import Iterator

import pytest
from hospital_world import World, running_world
from whole_world import WholeWorld


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The coordinator (without MLflow) and three connected hospitals, members of `tumours` and `lesions`."""
    with running_world(tmp_path_factory.mktemp("integration")) as world:
        world.study("tumours")
        world.study("lesions")
        world.warm_up("tumours")
        yield world


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeWorld]:
    """Coordinator, MLflow and four hospitals, set up by the commands that people type; tests leave them running."""
    world = WholeWorld.start(tmp_path_factory.mktemp("whole") / "stack")
    yield world
    world.stop()
