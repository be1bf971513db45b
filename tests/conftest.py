"""In which order the tests run, and when what a folder shares ends.

The long ones begin first, so that no worker is left with one of them at the end. A whole coordinator with its hospitals
takes more than a minute of two cores to start, and processor time even when nothing happens; so the files that share one run
on one worker, and it ends with the last test that needs it, not with the session.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent
FIRST = ("faults", "integration", "simulator", "fl_server", "fl_client")
# Files that share a coordinator, by its fixture; any other file goes to a worker by itself.
TOGETHER = {
    "faults": "world",
    "integration": "whole",
}
SHARED = pytest.StashKey[dict[str, ExitStack]]()
# An example is right or wrong, however long a busy machine takes for it: by itself Hypothesis allows 200 ms.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


class ByWorld(LoadScopeScheduling):
    """Hands out files, and those that share a coordinator together. (xdist's own groups do nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", maxsplit=1)[0].removeprefix("tests/")
        return TOGETHER.get(file) or TOGETHER.get(file.split("/")[0]) or file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByWorld:
    return ByWorld(config, log)


def folder_of(item: pytest.Item) -> str:
    """The folder below this one that a test lies in."""
    return item.path.relative_to(HERE).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*FIRST, folder_of(item)).index(folder_of(item)))


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Iterator[dict[str, ExitStack]]:
    """For each folder a stack: what is entered there ends after the folder's last test, at the latest with the session."""
    stacks = request.session.stash.setdefault(SHARED, defaultdict(ExitStack))
    yield stacks
    for stack in stacks.values():
        stack.close()


@pytest.hookimpl(trylast=True)  # after the tests' own fixtures, which may still use what is shared
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # Each worker goes through the folders in one order, so that it never comes back to one.
    stacks, folder = item.session.stash.get(SHARED, {}), folder_of(item)
    if folder in stacks and nextitem is not None and folder_of(nextitem) != folder:
        stacks.pop(folder).close()
