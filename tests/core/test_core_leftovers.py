"""What a killed process leaves is taken away, and nothing else."""

import subprocess
import sys
from pathlib import Path

from old_files import make_old, old_leftover

from medhive.leftovers import LEFTOVER_AGE_S, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from medhive.packing import FlatWriter, Layout
with FlatWriter(Path(sys.argv[1]), Layout.of({"w": (8,)})):
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_killed_writers_file_goes_once_nobody_can_write_it_any_more(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "RUN_1" / "global-1.safetensors"
    target.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.kill()
    [left] = target.parent.iterdir()
    assert left != target
    assert remove_leftovers(tmp_path) == 0, "it may still be in use"
    make_old(left, LEFTOVER_AGE_S + 60)
    assert remove_leftovers(tmp_path) == 1
    assert list(target.parent.iterdir()) == []


def test_other_files_stay_and_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    kept = [old_leftover(elsewhere)]
    gone = old_leftover(here / "deep" / "down")
    for name in ("a.tmp", ".hidden", "global-1.safetensors", "b.part"):
        path = here / name
        path.write_bytes(b"x")
        kept.append(make_old(path, 2 * LEFTOVER_AGE_S))
    (here / "link").symlink_to(elsewhere, target_is_directory=True)
    assert remove_leftovers(here) == 1
    assert not gone.exists()
    assert all(path.exists() for path in kept)
    assert remove_leftovers(tmp_path / "nothing") == 0
