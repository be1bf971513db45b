"""The round loop: one run of one specification, from its base weights to the final ones.

The loop talks to four seams (the gateway's desk, the sites that it asks, a folder, a clock) and owns the order of
things: updates stay on disk until their round closes; the sum is taken in the order of the sites' names; the checkpoint is
on disk before the round is reported. So it does not matter where a crash comes: the loop that is started anew reads the
checkpoint, takes the verified updates that lie in the open round's folder, and arrives at the same bits. Whether the sites
are hospitals behind a network (`fl_server.hospitals`) or simulated ones in the same process it does not know.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import structlog

from fl_server.checkpoint import Checkpoint, RunFolder, no_space_named
from fl_server.cohort import Present, sample
from fl_server.collect import (
    Answer,
    Clock,
    Collected,
    Correction,
    Question,
    StopRequested,
    Watch,
    drop_from,
    too_few,
    too_few_there,
)
from fl_server.flower import RunStopped
from fl_server.gateway import MAX_WEIGHTS_BYTES, Desk, LeaseLost, RunOver, closed_rounds
from fl_server.pooling import Scores, pooled_statistics
from fl_server.reports import (
    Timing,
    confusion_of,
    end_line,
    final_sites,
    fitting,
    metrics_of,
    round_line,
    round_report,
    scores_of,
    site_rounds,
)
from medhive.contribution import check_contribution, norm_outliers
from medhive.envelope import ContributionBody, TaskType
from medhive.errors import MedHiveError
from medhive.packing import Flat, Layout, WeightsFile, open_flat
from medhive.states import RoundState, RunState
from medhive.strategies import AggregateStats, Strategy, StrategyState, Update, make_strategy, require_rate_sum
from medhive.wire import Refusal, RoundReport, RunEnd, SiteRound

REASON_LENGTH = 500
"""What the gateway takes of a reason."""
NORM_OUTLIER, OTHER_COLUMNS, OTHER_WEIGHTS = "norm-outlier", "other-columns", "other-initial-weights"
OTHER_RATES = "other-learning-rates"
"""Codes of what only the comparison with the other sites shows."""
RATE_FACTOR = 10.0
"""All sites of a round follow one schedule, which differs from site to site by less than the rounding of its steps; a site
that claims rates far from the others' would bend SCAFFOLD's control variates."""
STATELESS = frozenset({"fedavg", "fedprox", "fedbn", "fedmedian", "fedtrimmedavg", "krum"})
"""Strategies that need nothing but the last weights to go on, so that another aggregator can."""

Statistics = dict[str, list[float]]

log = structlog.get_logger()


class TooFewSites(MedHiveError):
    """Fewer sites answered than the run, or its strategy, needs."""

    code = "too-few-sites"


class CheckpointLost(MedHiveError):
    """The run was begun by another aggregator, and what its strategy remembers is not here."""

    code = "checkpoint-lost"


class UpdateMissing(MedHiveError):
    """A contribution names an update that is not in the blob store, or none at all."""

    code = "update-missing"


Check = Callable[[ContributionBody, Path | None], Answer]
"""Makes an answer of what a site said and of the file with its update, or raises why it does not count."""
Refuse = Callable[[str, str], None]
"""Told of a contribution that does not count: in which site's name it came, and the error's code."""


class Sites(Protocol):
    """Those whom a run asks, by their names."""

    def present(self) -> Present:
        """Who may be asked now, in the order of names, and why others may not."""

    def ask(
        self,
        question: Question,
        sites: Sequence[str],
        check: Check,
        refuse: Refuse,
        on_asked: Callable[[], None],
    ) -> Collected:
        """Ask some of those present, and return when all have answered or been dropped, or too few can answer any more.

        Args:
            question: what to ask; says where its base lies, and where updates are put.
            sites: whom.
            check: looks at each answer before it counts; what it raises drops the site, except `NoSpace`.
            refuse: hears of every contribution that does not count.
            on_asked: done once all are asked, while they work.

        Raises:
            StopRequested, RunOver, LeaseLost, RunStopped: the run is not to go on here.
            NoSpace: the disk is full.
        """


@dataclass(frozen=True)
class _Opened:
    """A round that has begun: `at` on the wall, `since` on the monotonic clock."""

    number: int
    at: datetime
    since: float


@dataclass(frozen=True)
class _Drawn:
    """Whom a round asks: `sites` out of `population` that had consented, and `evaluators`; why others may not be asked."""

    sites: tuple[str, ...]
    left_out: Mapping[str, str]
    evaluators: Present
    population: int


@dataclass(frozen=True)
class _Told:
    """What evaluate-only sites said of a round's base: each one's row, and the scores of those that answered."""

    rows: tuple[SiteRound, ...]
    scores: Sequence[Scores]


class RunLoop:
    """Works through one run, whatever was done of it before.

    Args:
        desk: the gateway, for this run and lease.
        sites: whom to ask.
        watch: the run as it stands, for stops.
        folder: the run's own; what a former process left there is used.
        clock: time.
    """

    def __init__(self, *, desk: Desk, sites: Sites, watch: Watch, folder: Path, clock: Clock) -> None:
        self._desk = desk
        self._sites = sites
        self._folder = RunFolder(folder)
        self._clock = clock
        self._watch = watch
        self._run = watch.run
        self._options = self._run.spec.options
        self._classes = self._run.spec.data.classes
        self._evaluators = frozenset(item.site for item in self._run.consents if item.evaluates_only)
        self._refusals: list[Refusal] = []
        self._log = log.bind(run_id=self._run.id, study=self._run.study)

    def run(self) -> RunEnd:
        """Go on with the run until its end, and report that.

        Returns what was reported.

        Raises:
            LeaseLost, RunOver, RunStopped: the run is not this process's any more; nothing was reported.
        """
        try:
            end = self._work()
        except (LeaseLost, RunOver, RunStopped):
            raise
        except StopRequested as stop:
            end = self._end("cancelled", str(stop))
        except MedHiveError as error:
            end = self._end("failed", str(error))
        self._desk.end(end)
        self._log.info("run.ended", state=end.state, reason=end.reason, text=end_line(self._run.id, end))
        self._folder.remove()
        return end

    def _work(self) -> RunEnd:
        run = self._watch.refresh()
        if run.state == RunState.READY:
            self._desk.start()
        strategy = make_strategy(self._options.strategy, self._options.strategy_params)
        checkpoint = self._resume(strategy) or self._prepare(strategy)
        for number in range(checkpoint.round + 1, run.rounds + 1):
            checkpoint = self._round(number, checkpoint, strategy)
        return self._finish(checkpoint)

    # ---- beginning -------------------------------------------------------------------------------------------------

    def _resume(self, strategy: Strategy) -> Checkpoint | None:
        """Where a former process stopped; its last report is sent again, in case it died before."""
        checkpoint = self._folder.load(self._run.id, self._run.spec_hash)
        reported = closed_rounds(self._desk.rounds())
        newest = reported[-1].number if reported else 0
        if checkpoint is None or checkpoint.round < newest:
            return self._resume_elsewhere(strategy, newest, reported[-1].weights_digest) if newest else None
        self._desk.store(checkpoint.weights, checkpoint.weights_digest)
        if checkpoint.report is not None:
            self._report(checkpoint.round, checkpoint.report)
        self._log.info(
            "run.resumed", round=checkpoint.round, text=f"{self._run.id} goes on after round {checkpoint.round}"
        )
        return checkpoint

    def _resume_elsewhere(self, strategy: Strategy, newest: int, digest: str | None) -> Checkpoint:
        """Another aggregator did the rounds before. The gateway has their weights, but not what a strategy remembers."""
        if digest is None or strategy.name not in STATELESS:
            raise CheckpointLost(
                f"Rounds up to {newest} were done by another aggregator, whose checkpoint is not here; {strategy.name} "
                "cannot go on without it. Ask for the run again.",
                round=newest,
            )
        state = replace(strategy.initial_state(self._folder.strategy_folder), step=newest)
        weights = self._fetch_weights(digest, newest)
        return self._save(newest, weights, digest, state, self._base_statistics())

    def _prepare(self, strategy: Strategy) -> Checkpoint:
        """Base weights and statistics: from the version that the run starts from, else from the sites (round 0)."""
        opened = self._open(0)
        asked: list[Collected] = []
        statistics = self._base_statistics()
        if self._run.spec.data.table is not None and not statistics:
            collected, statistics = self._ask_statistics()
            asked.append(collected)
        digest = self._run.base_digest
        if digest is None:
            collected, digest = self._ask_initial_weights(statistics)
            asked.append(collected)
            digest, statistics = self._settle_version_zero(digest, statistics)
        weights = self._fetch_weights(digest, 0)
        _require_usable(weights)
        report = self._preparation_report(opened, asked, digest) if asked else None
        state = strategy.initial_state(self._folder.strategy_folder)
        checkpoint = self._save(0, weights, digest, state, statistics, report=report)
        if report is not None:
            self._report(0, report)
        return checkpoint

    def _base_statistics(self) -> Statistics:
        return self._desk.version_statistics(self._run.study, self._run.spec.base_version)

    def _ask_statistics(self) -> tuple[Collected, Statistics]:
        """The sums over all sites' training rows."""
        drawn = self._cohort(0, "Statistics", everybody=True)
        question = self._question(TaskType.STATISTICS, 0)
        collected = self._ask(question, drawn.sites, lambda body, _: Answer(body))
        pooled, wrong = pooled_statistics({site: item.body.statistics for site, item in collected.answers.items()})
        collected = self._without(collected, wrong, 0, OTHER_COLUMNS)
        self._require_enough("Statistics", collected, drawn.left_out)
        return collected, pooled

    def _ask_initial_weights(self, statistics: Statistics) -> tuple[Collected, str]:
        """The digest that the first site in the order of names made; a site that made another is named."""
        drawn = self._cohort(0, "Initial weights", everybody=True)
        question = self._question(TaskType.INITIALISE, 0, statistics=statistics)
        collected = self._ask(question, drawn.sites, _with_content)
        digests = {site: item.body.content_digest for site, item in collected.answers.items()}
        first = next(iter(digests), "")
        wrong = {
            site: f"its initial weights are {digest[:12]}, those of {first} are {digests[first][:12]}"
            for site, digest in digests.items()
            if digest != digests[first]
        }
        collected = self._without(collected, wrong, 0, OTHER_WEIGHTS)
        self._require_enough("Initial weights", collected, drawn.left_out)
        return collected, digests[first]

    def _settle_version_zero(self, digest: str, statistics: Statistics) -> tuple[str, Statistics]:
        """Name the study's version 0, or take what another run of the study named a moment before."""
        _require_usable(self._fetch_weights(digest, 0))
        self._desk.version_zero(digest, statistics)
        settled = self._watch.refresh(at_once=True).base_digest or digest
        return settled, self._base_statistics() or statistics

    def _fetch_weights(self, digest: str, number: int) -> Path:
        path = self._folder.weights_path(number)
        with no_space_named(path):
            self._desk.fetch(digest, path, MAX_WEIGHTS_BYTES)
        return path

    # ---- a round ---------------------------------------------------------------------------------------------------

    def _round(self, number: int, before: Checkpoint, strategy: Strategy) -> Checkpoint:
        opened = self._open(number)
        name = f"Round {number} of {self._run.rounds}"
        needed = max(self._options.min_sites, strategy.min_updates)
        drawn = self._cohort(number, name, needed)
        left_out = drawn.left_out
        collected, judged = self._ask_updates(opened, before, drawn, strategy, needed)
        told = _Told(site_rounds(judged, drawn.evaluators.left_out, self._classes), scores_of(judged, self._classes))
        try:
            self._require_enough(name, collected, left_out, needed)
            state, stats = self._aggregate(number, before, strategy, collected, drawn.population)
        except MedHiveError:
            self._report(number, self._round_report(RoundState.FAILED, opened, collected, left_out, before, told=told))
            self._log.warning("round.failed", round=number)
            raise
        weights = self._folder.weights_path(number)
        self._desk.store(weights, stats.digest)
        report = self._round_report(
            RoundState.CLOSED, opened, collected, left_out, before, told=told, digest=stats.digest
        )
        after = self._save(number, weights, stats.digest, state, before.statistics, report=report)
        self._report(number, report)
        line = f"{self._run.id} {round_line(number, self._run.rounds, report)}"
        figures = {"seconds": report.seconds, "overhead_s": report.overhead_s}
        self._log.info("round.closed", round=number, **figures, text=line)
        return after

    def _ask_updates(
        self, opened: _Opened, before: Checkpoint, drawn: _Drawn, strategy: Strategy, needed: int
    ) -> tuple[Collected, Collected]:
        """The updates of those who train, and what evaluate-only sites say meanwhile of the weights that they begin with."""
        number, sites, evaluators = opened.number, drawn.sites, drawn.evaluators.sites
        question = self._question(
            TaskType.TRAIN,
            number,
            needed=needed,
            base=before.weights,
            base_digest=before.weights_digest,
            base_size_bytes=before.weights.stat().st_size,
            statistics=before.statistics,
            evaluators=frozenset(evaluators),
            corrections=self._corrections(number, before, sites, strategy),
            updates=self._folder.round_folder(number),
        )
        layout = WeightsFile.at(before.weights).layout
        base = open_flat(before.weights)  # this process's own file, which nobody cuts short

        def check(body: ContributionBody, path: Path | None) -> Answer:
            if body.type is TaskType.EVALUATE:
                return self._check_evaluation(body, path)
            if strategy.corrects:
                require_rate_sum(body.site, body.rate_sum)
            return self._check_update(body, path, base, layout)

        # Announced while the sites work already: nobody waits for it.
        asked = self._ask(question, [*sites, *evaluators], check, lambda: self._announce(opened, sites, evaluators))
        collected, judged = asked.apart(self._evaluators)
        norms = {site: answer.norm for site, answer in collected.answers.items()}
        collected = self._without(collected, _outlier_reasons(norms), number, NORM_OUTLIER)
        if strategy.corrects:
            collected = self._without(collected, _other_rates(self._mean_rates(collected)), number, OTHER_RATES)
        return collected, judged

    def _corrections(
        self, number: int, before: Checkpoint, sites: Sequence[str], strategy: Strategy
    ) -> Mapping[str, Correction]:
        """What each site shall correct its steps by, where the strategy wants that; the site alone may read it."""
        found = {}
        if strategy.corrects:
            for site in sites:
                path = self._folder.correction_path(number, site)
                digest = strategy.correction(before.strategy, site, path)
                if digest is not None:
                    self._desk.store(path, digest, site)
                    found[site] = Correction(path, digest, path.stat().st_size)
        return found

    def _mean_rates(self, collected: Collected) -> dict[str, float]:
        """Each site's mean learning rate, by the number of steps that its examples come to."""
        rates = {}
        for site, answer in collected.answers.items():
            steps = self._options.local_epochs * math.ceil(answer.body.examples / self._options.batch_size)
            rates[site] = answer.body.rate_sum / max(1, steps)
        return rates

    def _check_update(self, body: ContributionBody, path: Path | None, base: Flat, layout: Layout) -> Answer:
        """Look at every number of an update, and at what the site says of itself."""
        Scores.of(body, self._classes)
        if path is None:
            raise UpdateMissing(f"{body.site} answered without an update.")
        return Answer(body, path, check_contribution(path, layout, base, whose=f"the update of {body.site}"))

    def _aggregate(
        self, number: int, before: Checkpoint, strategy: Strategy, collected: Collected, population: int
    ) -> tuple[StrategyState, AggregateStats]:
        updates = [
            Update(site, answer.path, answer.body.examples, answer.body.rate_sum)
            for site, answer in collected.answers.items()
            if answer.path
        ]
        out = self._folder.weights_path(number)
        return strategy.aggregate(before.weights, updates, before.strategy, out, population=population)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _finish(self, last: Checkpoint) -> RunEnd:
        """Let the sites judge the final weights. The run has its result, so whoever is silent here only goes unheard."""
        present = self._sites.present()
        training, evaluating = present.apart(self._evaluators)
        question = self._question(
            TaskType.EVALUATE,
            self._run.rounds,
            needed=0,
            base=last.weights,
            base_digest=last.weights_digest,
            base_size_bytes=last.weights.stat().st_size,
            statistics=last.statistics,
            evaluators=frozenset(evaluating.sites),
        )
        asked = self._ask(question, present.sites, self._check_evaluation)
        collected, judged = asked.apart(self._evaluators)
        scores = scores_of(collected, self._classes)
        end = RunEnd(
            fence=self._desk.fence,
            state="completed",
            reason="" if scores else "No site judged the final weights.",
            digest=last.weights_digest,
            metrics=metrics_of(scores, scores_of(judged, self._classes), self._classes),
            confusion=confusion_of(scores),
            sites=final_sites(last.report, site_rounds(collected, training.left_out, self._classes)),
            evaluators=site_rounds(judged, evaluating.left_out, self._classes),
            refusals=self._take_refusals(),
            statistics=last.statistics,
        )
        return fitting(end)

    def _check_evaluation(self, body: ContributionBody, _: Path | None) -> Answer:
        Scores.of(body, self._classes)
        return Answer(body)

    def _end(self, state: Any, reason: str) -> RunEnd:
        refusals = self._take_refusals()
        return RunEnd(fence=self._desk.fence, state=state, reason=reason[:REASON_LENGTH], refusals=refusals)

    # ---- asking and reporting --------------------------------------------------------------------------------------

    def _cohort(self, number: int, name: str, needed: int | None = None, *, everybody: bool = False) -> _Drawn:
        """Draw the sites of a round. Raises `TooFewSites`."""
        present, evaluators = self._sites.present().apart(self._evaluators)
        least = self._options.min_sites if needed is None else needed
        if len(present.sites) < least:
            raise TooFewSites(too_few_there(name, present, least), needed=least)
        sites = present.sites
        if not everybody:
            sites = sample(sites, self._options.fraction, least, self._options.seed, number)
        return _Drawn(sites, present.left_out, evaluators, len(present.sites) + len(present.left_out))

    def _question(self, kind: TaskType, number: int, needed: int | None = None, **content: Any) -> Question:
        return Question(
            type=kind,
            run_id=self._run.id,
            study=self._run.study,
            round=number,
            rounds=self._run.rounds,
            spec_hash=self._run.spec_hash,
            deadline_s=self._options.deadline_s,
            needed=self._options.min_sites if needed is None else needed,
            **content,
        )

    def _ask(
        self,
        question: Question,
        sites: Sequence[str],
        check: Check,
        on_asked: Callable[[], None] = lambda: None,
    ) -> Collected:
        return self._sites.ask(question, sites, check, self._refuse, on_asked)

    def _refuse(self, site: str, code: str) -> None:
        self._refusals.append(Refusal(site=site, code=code))

    def _take_refusals(self) -> tuple[Refusal, ...]:
        """What was refused since the last report, for the next one."""
        taken, self._refusals = tuple(self._refusals), []
        return taken

    def _without(self, collected: Collected, wrong: Mapping[str, str], number: int, code: str) -> Collected:
        """The same without the answers that do not fit the others', each with its reason."""
        for site in wrong:
            self._refuse(site, code)
        return drop_from(collected, wrong, run_id=self._run.id, round=number)

    def _require_enough(
        self, name: str, collected: Collected, left_out: Mapping[str, str], needed: int | None = None
    ) -> None:
        least = self._options.min_sites if needed is None else needed
        if len(collected.answers) < least:
            raise TooFewSites(too_few(name, collected, left_out, least), needed=least)

    def _open(self, number: int) -> _Opened:
        return _Opened(number, self._clock.now(), self._clock.monotonic())

    def _timing(self, opened: _Opened) -> Timing:
        return Timing(opened.at, self._clock.now(), self._clock.monotonic() - opened.since)

    def _announce(self, opened: _Opened, sites: Sequence[str], evaluators: Sequence[str]) -> None:
        rows = {"sites": _rows(sites), "evaluators": _rows(evaluators)}
        report = RoundReport(fence=0, state=RoundState.OPEN, opened_at=opened.at, **rows)
        self._report(opened.number, report)
        self._log.info("round.opened", round=opened.number, sites=list(sites))

    def _round_report(
        self,
        state: RoundState,
        opened: _Opened,
        collected: Collected,
        left_out: Mapping[str, str],
        before: Checkpoint,
        *,
        told: _Told,
        digest: str | None = None,
    ) -> RoundReport:
        return round_report(
            state,
            self._timing(opened),
            site_rounds(collected, left_out, self._classes),
            metrics_of(scores_of(collected, self._classes), told.scores, self._classes),
            evaluators=told.rows,
            base_size_bytes=before.weights.stat().st_size,
            digest=digest,
            refusals=self._take_refusals(),
        )

    def _preparation_report(self, opened: _Opened, asked: Sequence[Collected], digest: str) -> RoundReport:
        """Round 0: the last of its exchanges, with the reasons of both."""
        dropped = {site: reason for collected in asked for site, reason in collected.dropped.items()}
        answers = {site: item for site, item in asked[-1].answers.items() if site not in dropped}
        sites = site_rounds(Collected(answers, dropped), {}, self._classes)
        refusals = self._take_refusals()
        timing = self._timing(opened)
        return round_report(RoundState.CLOSED, timing, sites, {}, digest=digest, refusals=refusals)

    def _report(self, number: int, report: RoundReport) -> None:
        self._desk.report_round(number, report.model_copy(update={"fence": self._desk.fence}))

    def _save(
        self,
        number: int,
        weights: Path,
        digest: str,
        strategy: StrategyState,
        statistics: Statistics,
        *,
        report: RoundReport | None = None,
    ) -> Checkpoint:
        checkpoint = Checkpoint(
            run_id=self._run.id,
            spec_hash=self._run.spec_hash,
            seed=self._options.seed,
            round=number,
            weights=weights,
            weights_digest=digest,
            strategy=strategy,
            statistics=statistics,
            report=report,
        )
        self._folder.save(checkpoint)
        return checkpoint


def _rows(sites: Sequence[str]) -> tuple[SiteRound, ...]:
    return tuple(SiteRound(site=site) for site in sites)


def _with_content(body: ContributionBody, _: Path | None) -> Answer:
    if not body.content_digest:
        raise UpdateMissing(f"{body.site} made initial weights, but does not say which.")
    return Answer(body)


def _require_usable(weights: Path) -> None:
    """Refuse base weights that are no packed file or hold NaN: against themselves every change must be zero."""
    check_contribution(weights, WeightsFile.at(weights).layout, weights, whose="the base weights")


def _other_rates(rates: Mapping[str, float]) -> dict[str, str]:
    """Sites whose mean learning rate is not that of the others, with the reason."""
    middle = sorted(rates.values())[len(rates) // 2] if rates else 0.0
    reason = "its mean learning rate is {:.3g}, far from the others'"
    return {
        site: reason.format(rate)
        for site, rate in rates.items()
        if not middle / RATE_FACTOR <= rate <= middle * RATE_FACTOR
    }


def _outlier_reasons(norms: Mapping[str, float]) -> dict[str, str]:
    reason = "its update has a norm of {:.4g}, far above the others'"
    return {site: reason.format(norms[site]) for site in sorted(norm_outliers(norms))}
