"""The process of one run: reads the settings that it inherited, takes its lease's number, and runs the round loop.

Flower starts it through the bundle, for a run whose configuration holds nothing but the run's name and the lease's fence;
everything else comes from the gateway. Neither MLflow nor a plotting library is imported here: this process holds one
model and one update, and its memory is measured.
"""

import os
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import FrameType

import structlog

from fl_server.collect import Exchange
from fl_server.flower import RunStopped
from fl_server.gateway import GatewayDesk, LeaseLost, RunOver
from fl_server.logs import log_json
from fl_server.rounds import RunLoop
from fl_server.settings import ServerSettings

RUN_KEY, FENCE_KEY = "medhive-run", "medhive-fence"
"""What a Flower run is started with; the bundle knows the same two."""

log = structlog.get_logger()


TERMINATED = 143
"""The exit code of a process that SIGTERM ended, by the shell's convention."""


class SystemClock:
    """The machine's own time."""

    def now(self) -> datetime:
        """The wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def main(exchange: Exchange, config: Mapping[str, object]) -> None:
    """Work through the run that the configuration names.

    Returns when the run has ended, here or elsewhere; an error that it raises fails the Flower run, which the dispatcher
    then starts again.
    """
    log_json()
    signal.signal(signal.SIGTERM, _end_at_once)
    run_id, fence = str(config[RUN_KEY]), int(str(config[FENCE_KEY]))
    structlog.contextvars.bind_contextvars(run_id=run_id)
    settings = ServerSettings.load()
    with settings.gateway() as client:
        desk = GatewayDesk(client, run_id, fence)
        try:
            RunLoop(
                desk=desk,
                exchange=exchange,
                key=settings.coordinator_key(),
                folder=settings.runs_dir / run_id,
                clock=SystemClock(),
            ).run()
        except (LeaseLost, RunOver, RunStopped) as error:
            log.info("run.left", reason=str(error))
        finally:
            desk.close()


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """The service is going down, within seconds. Whatever is on disk is whole at any moment, so nothing is tidied up."""
    os._exit(TERMINATED)
