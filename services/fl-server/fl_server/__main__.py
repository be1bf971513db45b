"""`medhive-server`: the aggregator as one service.

`serve` keeps SuperLink, superexec and tracking running beside it and dispatches the gateway's runs to them; it ends within
five seconds of SIGTERM, and nothing it started outlives it. Whoever reads its standard output follows the runs; its log
goes to standard error.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import structlog

from fl_server.dispatcher import Dispatcher
from fl_server.flower import Command, SuperLink, superexec_command, superlink_command
from fl_server.gate import Gate
from fl_server.gateway import key_ids
from fl_server.locking import FolderLock
from fl_server.logs import log_json
from fl_server.monitoring import Figures, Leases
from fl_server.nodes import NodeRegistry
from fl_server.queues import Averager
from fl_server.settings import PREFIX, ServerSettings
from fl_server.supervisor import Relay, Service, Supervisor, require_free_port
from medhive import __version__
from medhive.client import GatewayClient
from medhive.errors import MedHiveError, Unreachable
from medhive.leftovers import remove_leftovers
from medhive.monitoring import LOOPBACK, served
from medhive.wire import API, CoordinatorAnswer

STEP_S = 1.0
"""How soon an approved run starts, a dead process is noticed, a new hospital's node is registered."""
GATEWAY_POLL_S = 0.5
THREAD_GRACE_S = 0.5
"""For a thread to notice the end; what it was at is done again by the next life."""

log = structlog.get_logger()


class Server:
    """Everything that `serve` does, until `stop`."""

    def __init__(self, settings: ServerSettings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._stopped = threading.Event()
        self._waited = threading.Event()
        self._superexec_died = threading.Event()
        self._trouble = ""

    def stop(self) -> None:
        """End the service; called by the main thread's signal handler, and by a thread that failed."""
        self._stopped.set()
        self._waited.set()

    def run(self) -> None:
        """Serve until `stop`.

        Raises:
            PortInUse, FolderInUse: another program, or another aggregator, is there already.
            MedHiveError: the gateway refuses this aggregator.
        """
        settings = self._settings
        settings.prepare()
        with FolderLock(settings.state_dir), settings.gateway() as gateway:
            log.info("server.tidied", leftovers=remove_leftovers(settings.state_dir))
            require_free_port(settings.fleet_port, f"{PREFIX}FLEET_PORT")
            self._introduce()
            with self._beside("waiting", lambda: self._wait_for_gateway(gateway)):
                self._waited.wait()
            if not self._stopped.is_set():
                self._serve(gateway)

    @contextmanager
    def _beside(self, name: str, work: Callable[[], None]) -> Iterator[None]:
        """Do `work`, which ends when stopped, on a thread of its own; what it fails of ends the service.

        Whatever talks to another service runs like this, and the main thread talks to none: a name that no resolver answers
        for, or a partner that is gone, holds up a call for longer than the service may take to end, and no signal
        interrupts the C library's resolver. Work that does not end in time is left: it may be killed at any moment.
        """
        failed: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                if not self._stopped.is_set():
                    failed.append(error)
                self.stop()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join(THREAD_GRACE_S)
        if failed:
            raise failed[0]

    def _introduce(self) -> None:
        settings = self._settings
        self._say(f"medhive-server {__version__}")
        self._say(f"state folder {settings.state_dir.resolve()}")
        self._say(f"gateway {settings.gateway_url}")
        self._say(f"fleet https://127.0.0.1:{settings.fleet_port}")
        self._say(f"tracking {settings.mlflow_url or 'off (MEDHIVE_SERVER_MLFLOW_URL is not set)'}")

    def _wait_for_gateway(self, gateway: GatewayClient) -> None:
        """Wait until it answers, or until stopped."""
        told = False
        while not self._stopped.is_set():
            try:
                coordinator = CoordinatorAnswer.model_validate(gateway.get(f"{API}/coordinator"))
                studies = gateway.get(f"{API}/studies")
            except Unreachable:
                if not told:
                    self._say(f"waiting for the gateway at {self._settings.gateway_url}")
                    told = True
                self._stopped.wait(GATEWAY_POLL_S)
                continue
            self._say(f"coordinator {coordinator.name}, key {coordinator.key_id}")
            for study in studies:
                version = study.get("newest_version")
                self._say(f"study {study['name']}, newest version {'none yet' if version is None else version}")
            self._waited.set()
            return

    def _serve(self, gateway: GatewayClient) -> None:
        """Look after the services, beside the threads that dispatch runs and average queues."""
        settings = self._settings
        figures = Figures(settings.state_dir)
        supervisor = Supervisor(_services(settings), Relay(observe=figures.observe), figures.started)
        superlink = SuperLink(address=settings.superlink_url, ca=settings.gateway_ca_file)
        nodes, dispatcher = NodeRegistry(gateway, superlink), self._dispatcher(gateway, superlink)
        figures.registry.register(Leases(dispatcher.lease_ages))
        try:
            with (
                _metrics(settings, figures),
                settings.gateway() as averagers,
                self._beside("runs", lambda: self._dispatch(nodes, dispatcher)),
                self._beside("averager", self._averager(averagers).serve),
            ):
                self._supervise(supervisor)
        finally:
            superlink.close()
            log.info("server.stopped")

    def _supervise(self, supervisor: Supervisor) -> None:
        """Keep the services running until stopped, or until one of them cannot run; then end them."""
        try:
            while not self._stopped.is_set():
                if "superexec" in supervisor.look():
                    self._superexec_died.set()
                self._stopped.wait(STEP_S)
        finally:
            self.stop()  # the threads as well, which have the time that the services take
            supervisor.stop()

    def _dispatch(self, nodes: NodeRegistry, dispatcher: Dispatcher) -> None:
        """Pass after pass until stopped."""
        pending = [dispatcher.stop_stale, dispatcher.remove_ended, lambda: self._say("ready")]
        while not self._stopped.is_set():
            if self._superexec_died.is_set():
                self._superexec_died.clear()
                pending.append(dispatcher.restart_all)
            # In this order: a run must find the nodes of its sites registered.
            self._try_all([*pending, nodes.sync, dispatcher.step], pending)
            self._stopped.wait(STEP_S)

    def _dispatcher(self, gateway: GatewayClient, superlink: SuperLink) -> Dispatcher:
        settings = self._settings
        return Dispatcher(
            gateway=gateway,
            superlink=superlink,
            holder=settings.holder(),
            leases_file=settings.state_dir / "leases.json",
            runs_dir=settings.runs_dir,
            max_runs=settings.max_runs,
            monotonic=time.monotonic,
        )

    def _averager(self, gateway: GatewayClient) -> Averager:
        """Averages what waits in queues; its transfers and sums hold up no run."""
        settings = self._settings
        return Averager(
            gateway=gateway,
            holder=settings.holder(),
            coordinator_key_ids=lambda: key_ids(gateway, settings.coordinator_key().public),
            folder=settings.state_dir / "queue",
            say=self._say,
            stopped=self._stopped,
        )

    def _try_all(self, steps: Sequence[Callable[[], None]], pending: list[Callable[[], None]]) -> None:
        """Do the steps in order; what is pending stays so until it was done once. An outage ends the pass."""
        try:
            for step in steps:
                step()
                if step in pending:
                    pending.remove(step)
        except MedHiveError as error:
            if str(error) != self._trouble:
                log.warning("server.trouble", reason=str(error), code=error.code)
            self._trouble = str(error)
        else:
            self._trouble = ""


def _metrics(settings: ServerSettings, figures: Figures) -> AbstractContextManager[object]:
    """Serve the figures where a port for them is set."""
    if settings.metrics_port is None:
        return nullcontext()
    return served(figures.registry, LOOPBACK, settings.metrics_port, f"{PREFIX}METRICS_PORT")


def _services(settings: ServerSettings) -> list[Service]:
    """SuperLink, superexec and, where asked for, the gate and tracking; each follows the files that it has read."""
    settings.superexec_secret_file.stat()
    shown = (settings.tls_cert, settings.tls_key, settings.gateway_ca_file)
    services = [
        Service("superlink", lambda: _superlink(settings), shown),
        # Its runs' processes trust the CA and sign with the key: they are started anew with it, and resume.
        Service("superexec", lambda: _superexec(settings), (settings.gateway_ca_file, settings.coordinator_key_file)),
    ]
    if settings.gate:
        services.append(Service("gate", _gate(settings, settings.gate).command, shown, signal.SIGHUP))
    if settings.mlflow_url:
        trusted = (settings.mlflow_ca_file,) if settings.mlflow_ca_file else ()
        services.append(Service("tracking", _tracking, trusted))
    return services


def _superlink(settings: ServerSettings) -> Command:
    return superlink_command(
        port=settings.fleet_port,
        database=settings.superlink_database,
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.gateway_ca_file,
        secret_file=settings.superexec_secret_file,
        home=settings.flower_home,
    )


def _superexec(settings: ServerSettings) -> Command:
    return superexec_command(
        port=settings.fleet_port,
        ca=settings.gateway_ca_file,
        secret_file=settings.superexec_secret_file,
        home=settings.flower_home,
    )


def _gate(settings: ServerSettings, address: str) -> Gate:
    return Gate(
        address=address,
        superlink_port=settings.fleet_port,
        certificate=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.gateway_ca_file,
        folder=settings.gate_dir,
        metrics_port=settings.metrics_port,
    )


def _tracking() -> Command:
    return Command([sys.executable, "-m", "fl_server", "track", "--parent-pid", str(os.getpid())], dict(os.environ))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit 0, 1 (failed, with one sentence), 2 (wrong use)."""
    parser = argparse.ArgumentParser(prog="medhive-server", description="The aggregator of MedHive.")
    parser.add_argument("--version", action="version", version=f"medhive-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="start the service; its settings are the variables MEDHIVE_SERVER_...")
    track = commands.add_parser("track", help="deliver runs to MLflow; started by serve")
    track.add_argument("--parent-pid", type=int, help="end when this process does")
    options = parser.parse_args(argv)
    log_json()
    try:
        settings = ServerSettings.load()
        _serve(settings) if options.command == "serve" else _track(settings, options.parent_pid)
    except MedHiveError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line's answer
        raise SystemExit(1) from None


def _serve(settings: ServerSettings) -> None:
    server = Server(settings, lambda line: print(line, flush=True))  # noqa: T201 - for people
    _on_signals(server.stop)
    server.run()


def _track(settings: ServerSettings, parent: int | None) -> None:
    from fl_server.tracking import track  # noqa: PLC0415 - MLflow is heavy, and only this process needs it

    stopped = threading.Event()
    _on_signals(stopped.set)
    if parent is not None:
        _stop_with_parent(parent, stopped)
    track(settings, stopped)


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop())


def _stop_with_parent(parent: int, stopped: threading.Event) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(STEP_S)
        stopped.set()

    threading.Thread(target=look, name="parent-monitor", daemon=True).start()


if __name__ == "__main__":
    main()
