"""What is told of a round: figures for the gateway, one line for people. Pure functions of what was collected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from fl_server.cohort import NO_CONSENT
from fl_server.collect import Answer, Collected
from fl_server.pooling import RECALL, Scores, pooled_confusion, pooled_metrics
from medhive.states import RoundState
from medhive.wire import NOT_ADDRESSED, Refusal, RoundReport, RunEnd, SiteRound

UPDATE_NORM = "update_norm"
"""L2 norm of a site's change, a figure of this service beside the site's own metrics."""
OF_SITES, OF_TEST_SETS = "val_", "test_"
"""How a metric begins that sites report of their validation parts, and how what evaluate-only sites report."""
SHOWN = ("val_accuracy", "test_accuracy", "train_loss")
"""What a line for people says of a round."""

REPORT_BYTES = 256 * 1024
"""The gateway takes a body of 1 MiB, and gives out all rounds of a run in one answer."""
LINE_LENGTH = 1000
"""Of a round's line, whose beginning says most; the record names every site. An event of more than 8 KiB, where a letter may
take six bytes, is neither shown nor counted."""

Report = TypeVar("Report", RoundReport, RunEnd)


@dataclass(frozen=True)
class Timing:
    """When a round began and ended on the wall, and how long it took."""

    opened_at: datetime
    closed_at: datetime
    seconds: float


def site_rounds(collected: Collected, left_out: Mapping[str, str], classes: Sequence[str]) -> tuple[SiteRound, ...]:
    """Each site's part, in the order of names: counted, dropped, or consenting and yet not to be asked.

    A site without a consent (declined, withdrawn) has no part; the run's consents tell of it.
    """
    rows = {site: _answered(site, answer, classes) for site, answer in collected.answers.items()}
    rows |= {site: SiteRound(site=site, dropped=reason) for site, reason in collected.dropped.items()}
    for site, reason in left_out.items():
        if reason in NO_CONSENT.values():
            continue
        rows.setdefault(site, SiteRound(site=site, dropped=NOT_ADDRESSED + reason))
    return tuple(rows[site] for site in sorted(rows))


def _answered(site: str, answer: Answer, classes: Sequence[str]) -> SiteRound:
    scores = Scores.of(answer.body, classes)
    norm = {UPDATE_NORM: answer.norm} if answer.path else {}
    return SiteRound(
        site=site,
        answered=True,
        examples=answer.body.examples,
        metrics={**scores.metrics, **norm},
        confusion=scores.confusion,
        training_s=answer.body.training_s,
        bytes_up=answer.path.stat().st_size if answer.path else 0,
    )


def round_report(
    state: RoundState,
    timing: Timing,
    sites: tuple[SiteRound, ...],
    metrics: Mapping[str, float],
    *,
    evaluators: tuple[SiteRound, ...] = (),
    base_size_bytes: int = 0,
    digest: str | None = None,
    refusals: tuple[Refusal, ...] = (),
) -> RoundReport:
    """The figures of a round.

    Args:
        state: closed or failed.
        timing: of the whole round, from the first question to the stored result.
        sites: from `site_rounds`.
        metrics: of all sites together.
        evaluators: from `site_rounds`, those that only evaluate.
        base_size_bytes: what each site that answered had to fetch.
        digest: of the new global weights.
        refusals: what was refused, whoever it came from.
    """
    answered = [site for site in sites if site.answered]
    slowest = max((site.training_s for site in (*answered, *evaluators)), default=0.0)
    report = RoundReport(
        fence=0,
        state=state,
        opened_at=timing.opened_at,
        closed_at=timing.closed_at,
        seconds=timing.seconds,
        overhead_s=max(0.0, timing.seconds - slowest),
        bytes_down=base_size_bytes * (len(answered) + sum(site.answered for site in evaluators)),
        bytes_up=sum(site.bytes_up for site in answered),
        metrics=dict(metrics),
        sites=sites,
        evaluators=evaluators,
        refusals=refusals,
        weights_digest=digest,
    )
    return fitting(report)


def fitting(report: Report) -> Report:
    """The same, and where it is too long without the sites' own matrices, or then without their recalls, one for each class.

    What is of all sites together stays, and so does every site with its other figures.
    """
    for lighter in (_without_matrix, _without_recalls):
        if len(report.model_dump_json()) <= REPORT_BYTES:
            break
        rows = {name: tuple(map(lighter, getattr(report, name))) for name in ("sites", "evaluators")}
        report = report.model_copy(update=rows)
    return report


def _without_matrix(site: SiteRound) -> SiteRound:
    return site.model_copy(update={"confusion": []})


def _without_recalls(site: SiteRound) -> SiteRound:
    kept = {name: value for name, value in site.metrics.items() if not name.startswith(RECALL)}
    return site.model_copy(update={"metrics": kept})


def metrics_of(trained: Sequence[Scores], judged: Sequence[Scores], classes: Sequence[str]) -> dict[str, float]:
    """The metrics of the sites that train, and as `test_*` those of the evaluate-only sites; neither counts in the other."""
    of_test_sets = pooled_metrics(judged, classes)
    tests = {
        OF_TEST_SETS + name.removeprefix(OF_SITES): value
        for name, value in of_test_sets.items()
        if name.startswith(OF_SITES)
    }
    return pooled_metrics(trained, classes) | tests


def final_sites(last: RoundReport | None, judged: tuple[SiteRound, ...]) -> tuple[SiteRound, ...]:
    """The sites behind the final weights: what each gave to the last round, with what it says of the result.

    A site that trained and then did not judge has its part in the weights all the same.
    """
    if last is None:
        return judged
    verdicts = {site.site: site for site in judged if site.answered}
    return tuple(_with_verdict(site, verdicts.get(site.site)) for site in last.sites)


def _with_verdict(site: SiteRound, verdict: SiteRound | None) -> SiteRound:
    metrics, confusion = (verdict.metrics, verdict.confusion) if verdict else ({}, [])
    return site.model_copy(update={"metrics": metrics, "confusion": confusion})


def scores_of(collected: Collected, classes: Sequence[str]) -> list[Scores]:
    """The believable numbers of every answer, in the order of names."""
    return [Scores.of(answer.body, classes) for answer in collected.answers.values()]


def confusion_of(scores: Sequence[Scores]) -> list[list[int]]:
    """The matrices added up."""
    return pooled_confusion([score.confusion for score in scores])


def round_line(number: int, rounds: int, report: RoundReport) -> str:
    """`round 2/10: 3 of 3 sites answered, val_accuracy 0.91, 12.3 s`, and who was dropped why."""
    answered = sum(site.answered for site in report.sites)
    parts = [f"round {number}/{rounds}: {answered} of {len(report.sites)} sites answered"]
    parts += [f"{name} {report.metrics[name]:.4g}" for name in SHOWN if name in report.metrics]
    parts.append(f"{report.seconds:.1f} s")
    everybody = (*report.sites, *report.evaluators)
    parts += [f"{site.site} dropped ({site.dropped})" for site in everybody if site.dropped]
    line = ", ".join(parts)
    return line if len(line) <= LINE_LENGTH else f"{line[:LINE_LENGTH]}..."


def end_line(run_id: str, end: RunEnd) -> str:
    """How a run ended, in one line."""
    if end.state != "completed":
        return f"{run_id} {end.state}: {end.reason}"
    accuracy = end.metrics.get("val_accuracy")
    return f"{run_id} completed" + ("" if accuracy is None else f", val_accuracy {accuracy:.4g}")
