"""One coordinator with three hospitals for the integration tests: real processes, started once, ended after the last one."""

from contextlib import ExitStack

import pytest
from hospital_world import World, running_world
from whole_world import WholeWorld

HERE = "integration"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, shared: dict[str, ExitStack]) -> World:
    """The coordinator (without MLflow) and three connected hospitals, members of `tumours` and `lesions`."""
    world = shared[HERE].enter_context(running_world(tmp_path_factory.mktemp(HERE)))
    world.study("tumours")
    world.study("lesions")
    world.warm_up("tumours")
    return world


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: dict[str, ExitStack]) -> WholeWorld:
    """Coordinator, MLflow and four hospitals, set up by the commands that people type; tests leave them running."""
    world = WholeWorld.start(tmp_path_factory.mktemp("whole") / "stack")
    shared[HERE].callback(world.stop)
    return world
