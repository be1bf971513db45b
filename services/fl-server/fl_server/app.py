"""The process of one run: reads the settings that it inherited, takes its lease's number, and runs the round loop.

Flower starts it through the bundle, for a run whose configuration holds nothing but the run's name and the lease's fence;
everything else comes from the gateway. Neither MLflow nor a plotting library is imported here: this process holds one
model and one update, and its memory is measured.
"""

import os
import signal
from collections.abc import Mapping
from types import FrameType

import structlog

from fl_server.collect import Exchange, SystemClock, Watch
from fl_server.flower import RunStopped
from fl_server.gateway import GatewayDesk, LeaseLost, RunOver
from fl_server.hospitals import Hospitals
from fl_server.logs import log_json
from fl_server.rounds import RunLoop
from fl_server.settings import ServerSettings

RUN_KEY, FENCE_KEY = "medhive-run", "medhive-fence"
"""What a Flower run is started with; the bundle knows the same two."""

log = structlog.get_logger()


TERMINATED = 143
"""The exit code of a process that SIGTERM ended, by the shell's convention."""


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
        desk, clock = GatewayDesk(client, run_id, fence), SystemClock()
        try:
            watch = Watch(desk.look, clock)
            hospitals = Hospitals(
                desk=desk, exchange=exchange, key=settings.coordinator_key(), watch=watch, clock=clock
            )
            folder = settings.runs_dir / run_id
            RunLoop(desk=desk, sites=hospitals, watch=watch, folder=folder, clock=clock).run()
        except (LeaseLost, RunOver, RunStopped) as error:
            log.info("run.left", reason=str(error))
        finally:
            desk.close()


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """The service is going down, within seconds. Whatever is on disk is whole at any moment, so nothing is tidied up."""
    os._exit(TERMINATED)
