"""One coordinator with three hospitals for all fault tests: real processes, started once, ended after the last of them."""

from contextlib import ExitStack

import pytest
from hospital_world import World, running_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, shared: dict[str, ExitStack]) -> World:
    """The coordinator and three connected hospitals with the study `tumours`; MLflow is away until a test starts it."""
    world = shared["faults"].enter_context(running_world(tmp_path_factory.mktemp("faults")))
    world.study("tumours")
    world.warm_up("tumours")
    return world
