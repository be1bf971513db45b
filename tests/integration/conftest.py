"""One whole MedHive for the integration tests: real processes, started once, ended after the last one."""

from contextlib import ExitStack

import pytest
from whole_world import WholeWorld


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: dict[str, ExitStack]) -> WholeWorld:
    """Coordinator, MLflow and four hospitals, set up by the commands that people type; tests leave them running."""
    world = WholeWorld.start(tmp_path_factory.mktemp("whole") / "stack")
    shared["integration"].callback(world.stop)
    return world
