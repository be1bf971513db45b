"""Which tests share a worker: those of one file, and those that share one running installation."""

from pathlib import Path

import pytest

SHARED = ("integration", "faults")


# First, since xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start a whole installation once for a folder, not once for every worker that meets one of its tests."""
    for item in items:
        folder = item.path.parent.name
        group = folder if folder in SHARED else str(Path(folder) / item.path.name)
        item.add_marker(pytest.mark.xdist_group(group))
