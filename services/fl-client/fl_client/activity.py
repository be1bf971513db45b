"""Telling the coordinator what this site does right now, without ever holding up what it does.

Only the newest word about each run is of use, so a slow or absent gateway makes older ones disappear, not queue up.
"""

import threading
from collections.abc import Callable

import structlog

from medhive.errors import MedHiveError, Unreachable
from medhive.wire import ActivityReport

RETRY_S = 1.0
CLOSE_WAIT_S = 5.0  # a word on its way to an absent gateway does not hold up the end of the process

log = structlog.get_logger()


class ActivityReporter:
    """A thread that posts the newest report of each run."""

    def __init__(self, post: Callable[[str, ActivityReport], None]) -> None:
        self._post = post
        self._newest: dict[str, ActivityReport] = {}
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="activity", daemon=True)
        self._thread.start()

    def report(self, run_id: str, report: ActivityReport) -> None:
        """Say this as soon as possible."""
        with self._change:
            self._newest[run_id] = report
            self._change.notify_all()

    def close(self) -> None:
        """Stop; what was not said stays unsaid."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(CLOSE_WAIT_S)

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._newest and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                run_id, report = self._newest.popitem()
            if not self._try(run_id, report):
                with self._change:
                    self._newest.setdefault(run_id, report)
                    self._change.wait(RETRY_S)

    def _try(self, run_id: str, report: ActivityReport) -> bool:
        try:
            self._post(run_id, report)
        except Unreachable:
            return False
        except MedHiveError as error:
            # The run may be over by now; nobody waits for this word.
            log.info("activity.refused", run_id=run_id, reason=error.code)
        return True
