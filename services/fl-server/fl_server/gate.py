"""The gate of a container: the one way from outside to the SuperLink, which itself listens on loopback alone.

nginx before it lets exactly the paths through that hospitals' nodes use, small and quickly sent. Whoever reaches this
container from the network of the containers therefore reaches nothing of Flower's control and runtime APIs, whatever
stands, or is broken into, in front of it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fl_server.flower import Command
from medhive.errors import MedHiveError

FLEET_PATHS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "pull-object",
    "push-object",
    "confirm-message-received",
)
"""What `flwr`'s fleet client posts to, less what registers nodes (the aggregator does that) and fetches code (none does)."""
MAX_BODY = "1m"
"""Messages are signed envelopes of a few kilobytes; weights travel by blob."""
WORKER_CONNECTIONS = 4096

CONFIGURATION = """\
# Written by medhive-server at each start.
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size {max_body};
    client_header_timeout 15s;
    client_body_timeout 30s;
    send_timeout 30s;
    ssl_protocols TLSv1.2 TLSv1.3;
    upstream superlink {{
        server 127.0.0.1:{superlink_port};
        keepalive 64;
    }}
    server {{
        listen {address} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        location / {{ return 404; }}
{metrics}        location ~ ^/v1/fleet/({paths})$ {{
            limit_except POST {{ deny all; }}
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_request_buffering off;
            proxy_read_timeout 75s;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_name localhost;
            proxy_ssl_session_reuse on;
        }}
    }}
}}
"""

METRICS = """\
        # For the proxy's own page of figures; the proxy passes nothing but the paths below on from outside.
        location = /metrics {{
            limit_except GET {{ deny all; }}
            proxy_pass http://127.0.0.1:{port};
        }}
"""


class NginxMissing(MedHiveError):
    """A gate is asked for, but its program is not installed."""

    code = "nginx-missing"


@dataclass(frozen=True)
class Gate:
    """Where the gate listens, and what it stands before: the SuperLink and, where there is a port of them, the figures."""

    address: str
    superlink_port: int
    certificate: Path
    key: Path
    ca: Path
    folder: Path
    metrics_port: int | None = None

    def command(self) -> Command:
        """Write the configuration, and say how nginx is started on it.

        Raises:
            NginxMissing: it is not installed.
        """
        program = shutil.which("nginx")
        if program is None:
            raise NginxMissing(
                "MEDHIVE_SERVER_GATE is set, but nginx is not installed; install it, or unset the variable."
            )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / "nginx.conf"
        path.write_text(self.configuration(), "utf-8")
        return Command(
            [program, "-e", "stderr", "-p", str(self.folder), "-c", str(path)], {"PATH": "/usr/sbin:/usr/bin:/bin"}
        )

    def configuration(self) -> str:
        """nginx's configuration as text."""
        return CONFIGURATION.format(
            folder=self.folder.resolve(),
            connections=WORKER_CONNECTIONS,
            max_body=MAX_BODY,
            superlink_port=self.superlink_port,
            address=self.address,
            certificate=self.certificate.resolve(),
            key=self.key.resolve(),
            ca=self.ca.resolve(),
            paths="|".join(FLEET_PATHS),
            metrics=METRICS.format(port=self.metrics_port) if self.metrics_port else "",
        )
