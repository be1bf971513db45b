"""What a service tells Prometheus: one registry a process, with what every service tells, and a page that serves it.

A service's own figures are collectors that it registers here. They are numbers; a label's value comes from a short list
or is the name of a study or of a site, and only the coordinator tells of sites.
"""

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector

from medhive import __version__
from medhive.errors import InvalidInput

LOOPBACK: Final = "127.0.0.1"
SLOWEST_S: Final = 10.0
"""For a request or its answer to get on: whoever is slower holds a thread for nothing."""


class Disks(Collector):
    """How full the disks of a service's folders are.

    Args:
        folders: by the names that they have in the figures.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)

    def collect(self) -> Iterator[Metric]:
        """Look now; a folder that is not there is left out."""
        size = GaugeMetricFamily("medhive_disk_size_bytes", "Size of the disk that holds a folder.", labels=["folder"])
        free = GaugeMetricFamily("medhive_disk_free_bytes", "What is free of it for this service.", labels=["folder"])
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue
            size.add_metric([name], usage.total)
            free.add_metric([name], usage.free)
        yield size
        yield free


def new_registry(folders: Mapping[str, Path]) -> CollectorRegistry:
    """A registry with the service's version, its process (memory, time, open files) and the disks of its folders."""
    disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter that nobody looks at
    registry = CollectorRegistry()
    Gauge("medhive_build_info", "1, with the version that runs.", ["version"], registry=registry).labels(
        __version__
    ).set(1)
    ProcessCollector(registry=registry)
    registry.register(Disks(folders))
    return registry


class _Handler(WSGIRequestHandler):
    timeout = SLOWEST_S

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int, variable: str) -> Iterator[int]:
    """Serve the registry over plain HTTP while the block runs; yields the port (a free one for 0).

    Raises:
        InvalidInput: the port is taken, or the host is not this machine's; the text names the variable.
    """
    try:
        server = make_server(host, port, make_wsgi_app(registry), ThreadingWSGIServer, _Handler)
    except OSError as error:
        raise InvalidInput(
            f"Cannot serve metrics on {host}:{port} ({error.strerror}); choose another port with {variable}, or unset it."
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
