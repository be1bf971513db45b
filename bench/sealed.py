"""What sealing weights for their reader costs: the same bytes, through the same gateway, plain and sealed in turn.

    python bench/sealed.py              # 28 and 50 MB, seven times each
    python bench/sealed.py --mb 5 --repeats 2

One gateway process over TLS on loopback, one hospital that has the way of `fl_client` to it; nobody in between. Prints one
JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from gateway_world import Hospital, World, running_gateway

from medhive.sealing import SealingKeyBody, SiteSealing
from medhive.signing import Signed, VerifyKey
from medhive.wire import API, RunAnswer

MAX_BYTES = 10**9


class Line:
    """A hospital's bytes, both ways."""

    def __init__(self, world: World, hospital: Hospital, run: RunAnswer, folder: Path) -> None:
        self.world, self.hospital, self.run, self.folder = world, hospital, run, folder
        self._count = 0
        key: Signed[SealingKeyBody] | None = hospital.coordinator.sealing_key
        assert key is not None
        coordinator = VerifyKey.from_text(hospital.coordinator.public_key)
        self.sealing = SiteSealing(
            hospital.site, hospital.key, coordinator, key.body.public_key, lambda: datetime.now(UTC)
        )

    def path(self, digest: str) -> str:
        return f"{API}/runs/{self.run.id}/blobs/{digest}"

    def fetch(self, megabytes: float, sealing: SiteSealing | None) -> float:
        """Seconds to fetch fresh weights and check them."""
        file, digest = self._weights(megabytes)
        self.world.server.upload(self.path(digest), file)
        target = self.folder / "fetched"
        target.unlink(missing_ok=True)
        return timed(
            lambda: self.hospital.client.download(
                self.path(digest), target, digest, max_bytes=MAX_BYTES, sealing=sealing
            )
        )

    def send(self, megabytes: float, sealing: SiteSealing | None) -> float:
        """Seconds to send fresh weights until the gateway has checked and kept them."""
        file, digest = self._weights(megabytes)
        return timed(lambda: self.hospital.client.upload(self.path(digest), file, sealing=sealing))

    def _weights(self, megabytes: float) -> tuple[Path, str]:
        self._count += 1
        return self.world.weights(seed=self._count, size=int(megabytes * 1e6 / 4))


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def line() -> Iterator[Line]:
    """A gateway, a hospital and a run."""
    with tempfile.TemporaryDirectory() as name, running_gateway(Path(name) / "state") as gateway:
        world = World(gateway, Path(name))
        try:
            hospital = world.hospital()
            run = world.ready(world.study(hospital), hospital)
            world.started(run)
            yield Line(world, hospital, run, Path(name))
        finally:
            world.close()


def compared(
    move: Callable[[float, SiteSealing | None], float], megabytes: float, sealing: SiteSealing, times: int
) -> Any:
    """Medians of both, taken in turn, after one of each that is not counted."""
    move(megabytes, None), move(megabytes, sealing)
    pairs = [(move(megabytes, None), move(megabytes, sealing)) for _ in range(times)]
    plain, sealed = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"plain_s": round(plain, 3), "sealed_s": round(sealed, 3), "times_as_long": round(sealed / plain, 2)}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=float, nargs="+", default=[28.0, 50.0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine.describe(), "rows": []}
    with line() as bytes_of:
        for megabytes in options.mb:
            down = compared(bytes_of.fetch, megabytes, bytes_of.sealing, options.repeats)
            up = compared(bytes_of.send, megabytes, bytes_of.sealing, options.repeats)
            report["rows"].append({"megabytes": megabytes, "down": down, "up": up})
    report["load_after"] = machine.load()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
