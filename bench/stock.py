"""Stock Flower on this machine, to measure beside MedHive: `flower-superlink` and `flower-supernode` as they come.

TLS and node authentication are on, as a federation of hospitals needs; all else is as Flower has it when nothing is said:
the database in memory, a process for every message.
"""

import datetime
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Final, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api_gateway.tls import Authority

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy" / "demo"))
from stack import Program, Stack, free_port, wait_until

APP = Path(__file__).parent / "stock_app"
ROUND_DEADLINE_S: Final = 600.0
START_DEADLINE_S: Final = 60.0
MAX_ANSWER_BYTES: Final = 1_000_000  # the app writes a few numbers


class Federation:
    """A SuperLink with SuperNodes; a context manager that ends them all."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._folder = folder.resolve()
        self._nodes = nodes
        self._port = free_port()
        self._programs: list[Program] = []
        # Lends its way to run commands; none of MedHive's services is started.
        self._shell = Stack(self._folder / "shell", mlflow=False)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        authority = Authority.open(self._folder, "benchmark")
        authority.ensure_leaf(self._folder, "server", (), datetime.datetime.now(datetime.UTC))
        (self._folder / "flwr").mkdir()
        (self._folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{self._port}"\n'
            f'root-certificates = "{self._folder / "ca.crt"}"\n'
        )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End everything, nodes first."""
        for program in reversed(self._programs):
            program.stop()

    def measure(self, shapes: dict[str, tuple[int, ...]], rounds: int) -> list[float]:
        """Send tensors of these shapes to every node and average what comes back; the seconds of each round.

        Raises:
            StackError: a process ended, or the rounds took longer than `ROUND_DEADLINE_S` each.
        """
        name = secrets.token_hex(4)
        wanted, out = self._folder / f"{name}-shapes.json", self._folder / f"{name}-seconds.json"
        wanted.write_text(json.dumps(shapes))
        config = f'shapes="{wanted}" out="{out}" nodes={self._nodes} rounds={rounds}'
        self._shell.run(["flwr", "run", str(APP), "bench", "--run-config", config], self._env())
        wait_until(out.exists, "the end of a stock run", ROUND_DEADLINE_S * rounds, self._require_all)
        answer: dict[str, Any] = json.loads(out.read_text()[:MAX_ANSWER_BYTES])
        return [float(seconds) for seconds in answer["seconds"]]

    def _require_all(self) -> None:
        for program in self._programs:
            program.require_running()

    def _env(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("MEDHIVE_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self._folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def _start(self) -> None:
        self._launch(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self._port),
            "--ssl-certfile", str(self._folder / "server.crt"), "--ssl-keyfile", str(self._folder / "server.key"),
            "--ssl-ca-certfile", str(self._folder / "ca.crt"), "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_until(self._answers, "the start of flower-superlink", START_DEADLINE_S, self._require_all)
        for number in range(self._nodes):
            key = self._make_key(number)
            self._shell.run(["flwr", "supernode", "register", f"{key}.pub", "bench"], self._env())
            self._launch(
                f"supernode-{number}", "flower-supernode", "--superlink", f"127.0.0.1:{self._port}",
                "--root-certificates", str(self._folder / "ca.crt"), "--auth-supernode-private-key", str(key),
                "--port", str(free_port()),
            )  # fmt: skip

    def _answers(self) -> bool:
        done = self._shell.failing(["flwr", "supernode", "list", "bench"], self._env())
        return done.returncode == 0

    def _launch(self, name: str, *argv: str) -> None:
        program = Program(name, argv, self._env(), self._folder / "logs" / f"{name}.log")
        self._programs.append(program.start())

    def _make_key(self, number: int) -> Path:
        key = ec.generate_private_key(ec.SECP384R1())
        path = self._folder / f"node-{number}"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
        )
        path.chmod(0o600)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        path.with_name(f"{path.name}.pub").write_bytes(public)
        return path
