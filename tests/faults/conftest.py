"""One coordinator with three hospitals for all fault tests: real processes, started once, ended with the session."""

from collections.abc import Iterator

import pytest
from hospital_world import World, running_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The coordinator, MLflow and three connected hospitals with the study `tumours`."""
    with running_world(tmp_path_factory.mktemp("faults"), mlflow=True) as world:
        world.study("tumours")
        world.warm_up("tumours")
        yield world
