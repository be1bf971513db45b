"""Sites that misbehave: some drop out, some are slow, some send poison. Who and when is drawn by the seed.

Time is counted in work, not in seconds: a normal site needs 1 for its part of a round and a slow one its factor, and a round
waits for `patience`. So the same seed gives the same bits, however busy the machine is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.tasks.base import FloatArray, Weights
from medhive.errors import InvalidInput

DEFAULT_FACTOR = 10.0  # as much slower as a machine without a GPU
DEFAULT_PATIENCE = 2.0
MAX_FACTOR = 1e6
BOOST = 1000.0  # a sum sent for a mean, a diverged optimiser
NOISE = 10.0  # times the norm of the honest change
DROPOUT, SLOW, POISON = 1, 2, 3  # one stream of the seed each

POISONS: Mapping[str, str] = MappingProxyType(
    {
        "nan": "not a number in every weight",
        "boost": "the honest change 1,000 times as large",
        "flip": "the honest change in the opposite direction",
        "noise": "random numbers, ten times as large as the honest change",
        "labels": "an honest training on wrong labels",
    }
)


class WrongFault(InvalidInput):
    """A fault cannot be simulated as it is written."""

    code = "wrong-fault"


@dataclass(frozen=True)
class Faults:
    """What goes wrong.

    dropout: chance that a site that is asked does not answer, drawn anew each round; slow_share of the sites need
    slow_factor times the work, and are late where that is more than `patience`; poison_share of the sites send `poison`.
    """

    dropout: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = DEFAULT_FACTOR
    poison_share: float = 0.0
    poison: str = ""
    patience: float = DEFAULT_PATIENCE

    @classmethod
    def parse(cls, dropout: float | None, slow: str | None, poison: str | None, patience: float | None) -> "Faults":
        """From the values of --dropout, --slow SHARE[:FACTOR], --poison SHARE:KIND and --patience.

        Raises:
            WrongFault: a value is none.
        """
        if patience is not None and not slow:
            raise WrongFault("--patience is how long a round waits for slow clients; give --slow too.")
        slow_share, _, factor = (slow or "0").partition(":")
        share, _, kind = (poison or "0:").partition(":")
        try:
            faults = cls(
                dropout or 0.0,
                float(slow_share),
                float(factor) if factor else DEFAULT_FACTOR,
                float(share),
                kind,
                DEFAULT_PATIENCE if patience is None else patience,
            )
        except ValueError as error:
            raise WrongFault("--slow takes SHARE or SHARE:FACTOR, --poison SHARE:KIND, such as 0.2:flip.") from error
        faults._require()
        return faults

    def _require(self) -> None:
        shares = {"--dropout": self.dropout, "--slow": self.slow_share, "--poison": self.poison_share}
        for flag, share in shares.items():
            if not 0 <= share <= 1:
                raise WrongFault(f"{flag} takes a share from 0 to 1, not {share:g}.")
        if not (1 <= self.slow_factor <= MAX_FACTOR and 1 <= self.patience <= MAX_FACTOR):
            raise WrongFault(f"The factor of --slow and --patience must be 1 to {MAX_FACTOR:g}.")
        if self.poison_share and self.poison not in POISONS:
            named = f"knows no {self.poison[:40]!r}" if self.poison else "takes SHARE:KIND, such as 0.2:flip"
            raise WrongFault(f"--poison {named}; it knows {', '.join(POISONS)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Fate:
    """What becomes of one site in one round: why it will not answer in time, if so; its poison; the work it needs."""

    lost: str = ""
    poison: str = ""
    work: float = 1.0


class Fates:
    """Who has which fault: the slow and the poisoners for the whole run, those who drop out each round anew."""

    def __init__(self, faults: Faults, sites: int, seed: int) -> None:
        self.faults = faults
        self._seed = seed
        self._slow = _drawn(sites, faults.slow_share, [seed, SLOW])
        self._poisoners = _drawn(sites, faults.poison_share, [seed, POISON])

    @property
    def poisoners(self) -> npt.NDArray[np.bool_]:
        """(sites,) whether each sends poison."""
        return self._poisoners

    def of(self, site: int, round_number: int) -> Fate:
        """The fate of a site, by its place in the order of names."""
        faults = self.faults
        if (
            faults.dropout
            and np.random.default_rng([self._seed, DROPOUT, round_number, site]).random() < faults.dropout
        ):
            return Fate(lost="dropped out (simulated)")
        work = faults.slow_factor if self._slow[site] else 1.0
        if work > faults.patience:
            return Fate(
                lost=f"late (simulated): it needs {work:g} times the work, the round waits for {faults.patience:g}"
            )
        return Fate("", faults.poison if self._poisoners[site] else "", work)


def poisoned(kind: str, base: Weights, honest: Weights, seed: Sequence[int]) -> dict[str, FloatArray]:
    """What a poisoner sends in place of its honest weights; poison of labels was in its training already."""
    if kind == "labels":
        return dict(honest)
    rng = np.random.default_rng([POISON, *seed])
    changes = {name: honest[name] - base[name] for name in honest}
    if kind == "nan":
        return {name: np.full_like(value, np.nan) for name, value in honest.items()}
    if kind == "noise":
        size = sum(change.size for change in changes.values())
        norm = float(np.sqrt(sum(float(np.square(change, dtype=np.float64).sum()) for change in changes.values())))
        spread = np.float32(NOISE * norm / np.sqrt(max(1, size)))
        return {name: base[name] + spread * rng.standard_normal(base[name].shape, np.float32) for name in honest}
    factor = np.float32({"boost": BOOST, "flip": -1.0}[kind])
    return {name: base[name] + factor * change for name, change in changes.items()}


def wrong_labels(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Each class taken for another: the first for the last, and so on."""
    return classes - 1 - labels


def _drawn(sites: int, share: float, seed: list[int]) -> npt.NDArray[np.bool_]:
    chosen = np.zeros(sites, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(sites)[: round(share * sites)]] = True
    return chosen
