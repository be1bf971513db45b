"""What a contribution must be before it counts: the right model, real numbers, and a change of believable size.

One wrong update spoils a mean for every hospital, so each is looked at twice. When it arrives, `check_contribution` reads
it once, piece by piece, and refuses another architecture, NaN and infinity, and a change above an absolute limit. When
the round closes, `norm_outliers` compares the sizes of the changes with one another, because what is a believable size
depends on model, data and round, and the other sites know it best.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from medhive.errors import InvalidInput, MedHiveError
from medhive.packing import Flat, Layout, WeightsFile, squared_distance, windows

NORM_OUTLIER_FACTOR = 30.0
"""An update this many times the median of the others' is refused.

Honest updates differ too: with equal epochs, a hospital with fifty times the images makes fifty times the steps, and its
change grows with something between the root of that and the number itself. A fault of scale (a diverged optimiser, a
sum sent for a mean, a deliberate boost) shows as a thousandfold. Thirty is the geometric middle between 1 and 1,000.
"""


MAX_FIGURE = 1e100
"""No metric and no sum over a table's column is larger; times any count of examples it stays a finite number."""


class NotFinite(MedHiveError):
    """Weights hold NaN or infinity."""

    code = "not-finite"


class NormTooLarge(MedHiveError):
    """The change is larger than is allowed."""

    code = "norm-too-large"

    def __init__(self, norm: float, limit: float, whose: str = "the update") -> None:
        super().__init__(
            f"The change of {whose} has a norm of {norm:.6g}, above the limit of {limit:.6g}. "
            "Train with a smaller learning rate, or check the data and the scaling.",
            norm=norm,
            limit=limit,
        )
        self.norm = norm
        self.limit = limit


@dataclass(frozen=True)
class ContributionLimits:
    """`max_norm` is the largest L2 norm of the change against the base weights; None leaves it to `norm_outliers`."""

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise InvalidInput(f"The largest allowed norm must be a positive number, not {self.max_norm}.")


def believable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics whose values can be: one site's nonsense must not make the mean of all infinite."""
    return {name: value for name, value in metrics.items() if abs(value) <= MAX_FIGURE}


def check_contribution(
    path: Path,
    layout: Layout,
    base: Path | Flat,
    limits: ContributionLimits | None = None,
    whose: str = "the update",
) -> float:
    """Read an update once, in constant memory, and return the L2 norm of its change against the base weights.

    Args:
        path: packed file with the full weights after local training.
        layout: the architecture that the run trains.
        base: the weights that the round began with, as a packed file or a vector of `layout.size` elements.
        limits: absolute limits.
        whose: names the update in errors, for example "the update of st_mary".

    Raises:
        CorruptWeights, NotFound: no packed file.
        WrongLayout: another architecture; names the first tensor that differs.
        NotFinite: NaN or infinity; names the first tensor concerned.
        NormTooLarge: carries `norm` and `limit`.
    """
    update = WeightsFile.at(path)
    layout.require(update.layout, whose)
    square = 0.0
    for start, block, before in _pairs(update, layout, base):
        part = squared_distance(block, before)
        if not math.isfinite(part):
            raise _not_finite(layout, start, block, whose)
        square += part
    norm = math.sqrt(square)
    if limits is not None and limits.max_norm is not None and norm > limits.max_norm:
        raise NormTooLarge(norm, limits.max_norm, whose)
    return norm


def norm_outliers(norms: Mapping[str, float], factor: float = NORM_OUTLIER_FACTOR) -> set[str]:
    """The sites whose change is more than `factor` times the median of the other sites' changes.

    Args:
        norms: site to L2 norm of its change, of all updates that passed `check_contribution`.
        factor: above 1.

    A site is compared with the others alone, so that it does not excuse itself. The rule is defined for every number
    of sites, and trusts the majority:

    - Nobody to compare with (one site): nobody is refused.
    - Two sites: only the larger can be refused. Which of the two is wrong cannot be known, but the small change does no
      harm, and the round then closes with one update or fails with the reason, as `min_sites` says.
    - Three or more: with two others, the median is their mean, so one site whose change is close to nothing makes
      nobody else an outlier; in return two of three sites that are both a thousand times too large pass, as a majority.
    - A change of exactly zero (a site that could not train) is no measure: zeros are left out of the median.
    - NaN or infinity is always refused and never measured with.

    Raises `InvalidInput` for a factor that is not above 1.
    """
    if not factor > 1:
        raise InvalidInput(f"The factor for outlying norms must be above 1, not {factor}.")
    return {
        site
        for site, norm in norms.items()
        if not math.isfinite(norm) or norm > factor * _median_of_others(site, norms)
    }


def _median_of_others(site: str, norms: Mapping[str, float]) -> float:
    """Infinite when there is nothing to compare with."""
    others = [norm for other, norm in norms.items() if other != site and math.isfinite(norm) and norm > 0]
    return median(others) if others else math.inf


def _pairs(update: WeightsFile, layout: Layout, base: Path | Flat) -> Iterator[tuple[int, Flat, Flat]]:
    """Windows of the update beside the same windows of the base."""
    read_base = _reader(layout, base)
    for window in windows(layout.size):
        start, stop = window.start, window.stop
        yield start, update.read(start, stop), read_base(start, stop)


def _reader(layout: Layout, base: Path | Flat) -> Callable[[int, int], Flat]:
    if isinstance(base, Path):
        file = WeightsFile.at(base)
        layout.require(file.layout, "the base weights")
        return file.read
    layout.require_length(base)
    return lambda start, stop: base[start:stop]


def _not_finite(layout: Layout, start: int, block: Flat, whose: str) -> NotFinite:
    wrong = np.flatnonzero(~np.isfinite(block))
    if not wrong.size:
        return NotFinite("The base weights hold NaN or infinity; roll back to an earlier version.")
    tensor = layout.name_at(start + int(wrong[0]))
    return NotFinite(
        f"Tensor {tensor!r} of {whose} holds NaN or infinity ({wrong.size} in the first MiB concerned). "
        "Train with a smaller learning rate, or check the data.",
        tensor=tensor,
        count=int(wrong.size),
    )
