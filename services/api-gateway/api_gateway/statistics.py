"""A few figures over everything: for the coordinator's people, and for the monitoring."""

from sqlalchemy import Select, func, select

from api_gateway import blobs, runs
from api_gateway.models import Round, Site, Version
from api_gateway.work import Work
from medhive.states import RunState, SiteState
from medhive.wire import Statistics

ACCURACY = "val_accuracy"
JUDGED = (RunState.COMPLETED, RunState.FAILED)
"""The states that say whether runs succeed; a run that people stopped or did not consent to says nothing of that."""


def compute(work: Work) -> Statistics:
    """The figures as of now."""
    by_state = runs.counts(work)
    judged = sum(by_state.get(state, 0) for state in JUDGED)
    down, up = work.session.execute(
        select(func.coalesce(func.sum(Round.bytes_down), 0), func.coalesce(func.sum(Round.bytes_up), 0))
    ).one()
    return Statistics(
        runs=sum(by_state.values()),
        runs_by_state=by_state,
        success_rate=by_state.get(RunState.COMPLETED, 0) / judged if judged else None,
        mean_accuracy=_mean_accuracy(work),
        sites=_count(work, select(func.count()).select_from(Site).where(Site.state == SiteState.ACTIVE)),
        images=_images(work),
        versions=_count(work, select(func.count()).select_from(Version)),
        bytes_down=int(down),
        bytes_up=int(up),
        blob_bytes=blobs.total_bytes(work),
    )


def _count(work: Work, query: Select[int]) -> int:
    return work.session.execute(query).scalar_one()


def _mean_accuracy(work: Work) -> float | None:
    every = work.session.scalars(select(Version.metrics).where(Version.number > 0))
    found = [metrics[ACCURACY] for metrics in every if ACCURACY in metrics]
    return sum(found) / len(found) if found else None


def _images(work: Work) -> int:
    """The examples that sites have trained on: of each site the most that it ever gave to one round."""
    most: dict[str, int] = {}
    for report in work.session.scalars(select(Round.report)):
        for site in report["sites"]:
            most[site["site"]] = max(most.get(site["site"], 0), site["examples"])
    return sum(most.values())
