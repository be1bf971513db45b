"""Stands in for ngrok's agent: speaks its local API (`/api/tunnels`) and its log lines, and forwards bytes on loopback.

Started by pyngrok as `<agent> start --none --log stdout --config FILE`. `orders/` beside the configuration holds what a test
wants: `plan` = `free` refuses TLS tunnels, `lose` drops all tunnels; `calls` gets each start's arguments and environment.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 65536
CONFIG = Path(sys.argv[sys.argv.index("--config") + 1])
ORDERS = CONFIG.parent / "orders"
TUNNELS: dict[str, dict[str, Any]] = {}


def forward(upstream: str) -> int:
    """Pass connections to a new port on to HOST:PORT; returns the port."""
    host, _, port = upstream.rpartition("://")[2].rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, int(port)))
            threading.Thread(target=pipe, args=(near, far), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def pipe(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError), near, far:
        while True:
            for side in select.select([near, far], [], [])[0]:
                piece = side.recv(PIECE)
                if not piece:
                    return
                (far if side is near else near).sendall(piece)


class Api(BaseHTTPRequestHandler):
    """The agent's local API, as far as pyngrok uses it."""

    def do_GET(self) -> None:
        if (ORDERS / "lose").exists():
            TUNNELS.clear()
            (ORDERS / "lose").unlink()
        self._answer(200, {"tunnels": list(TUNNELS.values()), "uri": "/api/tunnels"})

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        plan = (ORDERS / "plan").read_text() if (ORDERS / "plan").exists() else "paid"
        if wanted["proto"] == "tls" and plan == "free":
            self._answer(
                400, {"error_code": 103, "status_code": 400, "msg": f"not in your plan; Your authtoken: {token()}"}
            )
            return
        scheme = "tls" if wanted["proto"] == "tls" else "https"
        host = wanted.get("domain") or f"localhost:{forward(wanted['addr'])}"
        tunnel = {
            "name": wanted["name"],
            "uri": f"/api/tunnels/{wanted['name']}",
            "public_url": f"{scheme}://{host}",
            "proto": wanted["proto"],
            "config": {"addr": wanted["addr"], "inspect": False},
        }
        TUNNELS[wanted["name"]] = tunnel
        self._answer(201, tunnel)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Only the agent's own lines go out."""


def token() -> str:
    return str(json.loads(CONFIG.read_text().partition("authtoken: ")[2].splitlines()[0]))


def say(line: str) -> None:
    sys.stdout.write(f"t=2026-11-25T00:00:00+0000 lvl=info {line}\n")
    sys.stdout.flush()


def main() -> None:
    ORDERS.mkdir(exist_ok=True)
    with (ORDERS / "calls").open("a") as calls:
        calls.write(json.dumps({"argv": sys.argv, "environment": dict(os.environ)}) + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    say(f'msg="starting web service" obj=web addr=127.0.0.1:{server.server_address[1]} allow_hosts=[]')
    say('msg="client session established" obj=tunnels.session')
    say('msg="tunnel session started" obj=tunnels.session')
    server.serve_forever()


if __name__ == "__main__":
    main()
