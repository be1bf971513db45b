"""`make demo-queue`: training without appointment, twelve hospitals to a queue of ten, on one machine.

It types the commands that people type. No hospital is ever connected while another one trains: each joins, agrees, trains
from the newest model on its own phantoms, uploads and is gone. The tenth upload makes the aggregator average.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from demo import ended_by_signals, explain_failure, new_folder, say, shown, title
from stack import Stack, StackError, wait_until

from fl_client.tasks.phantoms import CLASSES, make_phantoms
from medhive.errors import MedHiveError

STUDY: Final = "brain-mri"
HOSPITALS: Final = 12
CAPACITY: Final = 10
# Small and quick: what is shown is the queue; what a model learns is shown by make demo.
PER_CLASS: Final = 16
STUDY_FLAGS: Final = ("--option", "image_size=32")
AVERAGE_DEADLINE_S: Final = 120.0


class QueueDemo:
    """The steps, in order."""

    def __init__(self, folder: Path) -> None:
        self.stack = Stack(folder, show=say, mlflow=False)
        self.sites = [f"hospital-{chr(ord('a') + index)}" for index in range(HOSPITALS)]

    def run(self) -> None:
        """All steps.

        Raises:
            StackError: one failed, or the queue is not what it should be.
        """
        self.open_queue()
        for number, site in enumerate(self.sites, 1):
            title(f"{site}: joins, agrees, trains, uploads ({number} of {HOSPITALS})")
            self.contribute(number, site)
            shown(self.stack.admin("queue", "status", STUDY))
        self.show_result()

    def open_queue(self) -> None:
        """A coordinator with one study and its queue."""
        title("Coordinator: a study and its queue")
        password = self.stack.start()
        self.stack.login(password or "")
        self.stack.admin(
            "studies", "create", STUDY, "--task", "image-folder", "--classes", ",".join(CLASSES), *STUDY_FLAGS
        )
        shown(self.stack.admin("studies", "queue", STUDY, "--capacity", str(CAPACITY), "--local-epochs", "1"))

    def contribute(self, number: int, site: str) -> None:
        """All that one hospital does."""
        make_phantoms(self.stack.site_folder(site) / "data", PER_CLASS, number)
        self.stack.join(site, STUDY)
        queue = self.stack.admin_json("queue", "status", STUDY)["queue_id"]
        self.stack.site(site, "consent", queue, "--person", f"Dr. {site[-1].upper()}", "--yes")
        shown(self.stack.site(site, "train", STUDY, "--upload"))

    def show_result(self) -> None:
        """One version of the first ten, and two that wait."""
        title(f"The version of the first {CAPACITY}")
        status: dict[str, Any] = {}

        def averaged() -> bool:
            status.update(self.stack.admin_json("queue", "status", STUDY))
            return status["newest_version"] == 1 and not status["averaging"]

        wait_until(averaged, "the average", AVERAGE_DEADLINE_S)
        shown(self.stack.admin("model", STUDY, "1"))
        shown(self.stack.site(self.sites[-1], "download", STUDY))
        shown(self.stack.admin("queue", "status", STUDY))
        if status["queue_size"] != HOSPITALS - CAPACITY:
            raise StackError(f"{HOSPITALS - CAPACITY} contributions should wait, not {status['queue_size']}.")


def main() -> int:
    """Run the demo; exit code 0 only when every step worked."""
    began, demo = time.monotonic(), QueueDemo(new_folder())
    with ended_by_signals(), demo.stack as stack:
        try:
            demo.run()
            title(f"Done in {time.monotonic() - began:.0f} s")
        except KeyboardInterrupt:
            return 130
        except (StackError, MedHiveError, subprocess.TimeoutExpired, OSError) as error:
            explain_failure(stack, error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
