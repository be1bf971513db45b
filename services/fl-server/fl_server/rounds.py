"""The round loop: one run of one specification, from its base weights to the final ones.

The loop talks to four seams (the gateway's desk, the exchange with the nodes, a folder, a clock) and owns the order of
things: updates stay on disk until their round closes; the sum is taken in the order of the sites' names; the checkpoint is
on disk before the round is reported. So it does not matter where a crash comes: the loop that is started anew reads the
checkpoint, takes the verified updates that lie in the open round's folder, and arrives at the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from fl_server.checkpoint import Checkpoint, RunFolder, no_space_named, write_durably
from fl_server.cohort import Member, sample, standing
from fl_server.collect import (
    Accept,
    Answer,
    Clock,
    Collected,
    Collector,
    Exchange,
    Question,
    StopRequested,
    Watch,
    drop_from,
    too_few,
)
from fl_server.flower import RunStopped
from fl_server.gateway import MAX_WEIGHTS_BYTES, Desk, LeaseLost, RunOver, closed_rounds
from fl_server.pooling import Scores, pooled_metrics, pooled_statistics
from fl_server.reports import (
    Timing,
    confusion_of,
    end_line,
    final_sites,
    round_line,
    round_report,
    scores_of,
    site_rounds,
)
from medhive.contribution import check_contribution, norm_outliers
from medhive.envelope import Contribution, TaskType, check_contribution_envelope, from_bytes, to_bytes
from medhive.errors import MedHiveError, NotFound, TooLarge
from medhive.packing import WeightsFile
from medhive.signing import SigningKey
from medhive.states import RoundState, RunState
from medhive.strategies import AggregateStats, Strategy, StrategyState, Update, make_strategy
from medhive.wire import Refusal, RoundReport, RunEnd, SiteRound

HEADER_ROOM_BYTES = 1024 * 1024
"""How much longer an update may be than its base: texts in the header differ, numbers do not."""
REASON_LENGTH = 500
"""What the gateway takes of a reason."""
NORM_OUTLIER, OTHER_COLUMNS, OTHER_WEIGHTS = "norm-outlier", "other-columns", "other-initial-weights"
"""Codes of what only the comparison with the other sites shows."""
STATELESS = frozenset({"fedavg", "fedprox", "fedmedian", "fedtrimmedavg", "krum"})
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


@dataclass(frozen=True)
class _Opened:
    """A round that has begun: `at` on the wall, `since` on the monotonic clock."""

    number: int
    at: datetime
    since: float


class RunLoop:
    """Works through one run, whatever was done of it before.

    Args:
        desk: the gateway, for this run and lease.
        exchange: the way to the nodes.
        key: the coordinator's, signs every task.
        folder: the run's own; what a former process left there is used.
        clock: time.
    """

    def __init__(self, *, desk: Desk, exchange: Exchange, key: SigningKey, folder: Path, clock: Clock) -> None:
        self._desk = desk
        self._exchange = exchange
        self._key = key
        self._folder = RunFolder(folder)
        self._clock = clock
        self._watch = Watch(desk.look, clock)
        self._run = self._watch.run
        self._options = self._run.spec.options
        self._classes = self._run.spec.data.classes
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
        members, left_out = self._cohort(0, "Statistics", everybody=True)
        question = self._question(TaskType.STATISTICS, 0)
        collected = self._collect(question, members, lambda _, contribution: Answer(contribution))
        pooled, wrong = pooled_statistics({site: item.body.statistics for site, item in collected.answers.items()})
        collected = self._without(collected, wrong, 0, OTHER_COLUMNS)
        self._require_enough("Statistics", collected, left_out)
        return collected, pooled

    def _ask_initial_weights(self, statistics: Statistics) -> tuple[Collected, str]:
        """The digest that the first site in the order of names made; a site that made another is named."""
        members, left_out = self._cohort(0, "Initial weights", everybody=True)
        question = self._question(TaskType.INITIALISE, 0, statistics=statistics)
        collected = self._collect(question, members, _with_content)
        digests = {site: item.body.content_digest for site, item in collected.answers.items()}
        first = next(iter(digests), "")
        wrong = {
            site: f"its initial weights are {digest[:12]}, those of {first} are {digests[first][:12]}"
            for site, digest in digests.items()
            if digest != digests[first]
        }
        collected = self._without(collected, wrong, 0, OTHER_WEIGHTS)
        self._require_enough("Initial weights", collected, left_out)
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
        members, left_out = self._cohort(number, name, needed)
        collected = self._ask_updates(opened, before, members, needed)
        try:
            self._require_enough(name, collected, left_out, needed)
            state, stats = self._aggregate(number, before, strategy, collected)
        except MedHiveError:
            self._report(number, self._round_report(RoundState.FAILED, opened, collected, left_out, before))
            self._log.warning("round.failed", round=number)
            raise
        weights = self._folder.weights_path(number)
        self._desk.store(weights, stats.digest)
        report = self._round_report(RoundState.CLOSED, opened, collected, left_out, before, digest=stats.digest)
        after = self._save(number, weights, stats.digest, state, before.statistics, report=report)
        self._report(number, report)
        line = f"{self._run.id} {round_line(number, self._run.rounds, report)}"
        figures = {"seconds": report.seconds, "overhead_s": report.overhead_s}
        self._log.info("round.closed", round=number, **figures, text=line)
        return after

    def _ask_updates(self, opened: _Opened, before: Checkpoint, members: Sequence[Member], needed: int) -> Collected:
        number = opened.number
        folder = self._folder.round_folder(number)

        def accept(_: Member, contribution: Contribution) -> Answer:
            return self._accept_update(contribution, before.weights, folder)

        question = self._question(
            TaskType.TRAIN,
            number,
            needed=needed,
            base_digest=before.weights_digest,
            base_size_bytes=before.weights.stat().st_size,
            statistics=before.statistics,
        )
        kept = self._kept(question, members, accept, folder)
        # Announced while the sites work already: nobody waits for it.
        collected = self._collect(question, members, accept, kept, lambda: self._announce(opened, members))
        norms = {site: answer.norm for site, answer in collected.answers.items()}
        return self._without(collected, _outlier_reasons(norms), number, NORM_OUTLIER)

    def _accept_update(self, contribution: Contribution, base: Path, folder: Path) -> Answer:
        """Fetch an update and look at every number of it; keep the signed contribution beside it for a resumed round."""
        body = contribution.body
        Scores.of(body, self._classes)
        largest = base.stat().st_size + HEADER_ROOM_BYTES
        if not body.content_digest:
            raise UpdateMissing(f"{body.site} answered without an update.")
        if body.content_size_bytes > largest:
            raise TooLarge(f"The update has {body.content_size_bytes} bytes, its base {base.stat().st_size}.")
        path = folder / f"{body.site}.safetensors"
        try:
            with no_space_named(path):
                self._desk.fetch(body.content_digest, path, largest)
            stats = check_contribution(path, WeightsFile.at(base).layout, base, whose=f"the update of {body.site}")
        except NotFound as error:
            raise UpdateMissing("The update that the contribution names is not in the blob store.") from error
        except MedHiveError:
            path.unlink(missing_ok=True)
            raise
        write_durably(_envelope_path(folder, body.site), to_bytes(contribution))
        return Answer(contribution, path, stats.norm)

    def _kept(self, question: Question, members: Sequence[Member], accept: Accept, folder: Path) -> dict[str, Answer]:
        """The answers of this very round that a former process verified; each is verified again."""
        kept = {}
        for member in members:
            path = _envelope_path(folder, member.site)
            if not path.exists():
                continue
            try:
                contribution = from_bytes(Contribution, path.read_bytes())
                check_contribution_envelope(contribution, member.key, question.to(member.site, self._clock.now()))
                kept[member.site] = accept(member, contribution)
            except MedHiveError as error:
                self._log.warning("contribution.discarded", site=member.site, round=question.round, reason=str(error))
                path.unlink(missing_ok=True)
        return kept

    def _aggregate(
        self, number: int, before: Checkpoint, strategy: Strategy, collected: Collected
    ) -> tuple[StrategyState, AggregateStats]:
        updates = [
            Update(site, answer.path, answer.body.examples) for site, answer in collected.answers.items() if answer.path
        ]
        out = self._folder.weights_path(number)
        return strategy.aggregate(before.weights, updates, before.strategy, out)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _finish(self, last: Checkpoint) -> RunEnd:
        """Let the sites judge the final weights. The run has its result, so whoever is silent here only goes unheard."""
        members, left_out = self._standing()
        question = self._question(
            TaskType.EVALUATE,
            self._run.rounds,
            needed=0,
            base_digest=last.weights_digest,
            base_size_bytes=last.weights.stat().st_size,
            statistics=last.statistics,
        )
        collected = self._collect(question, members, self._accept_evaluation)
        scores = scores_of(collected, self._classes)
        return RunEnd(
            fence=self._desk.fence,
            state="completed",
            reason="" if scores else "No site judged the final weights.",
            digest=last.weights_digest,
            metrics=pooled_metrics(scores, self._classes),
            confusion=confusion_of(scores),
            sites=final_sites(last.report, site_rounds(collected, left_out, self._classes)),
            refusals=self._take_refusals(),
            statistics=last.statistics,
        )

    def _accept_evaluation(self, _: Member, contribution: Contribution) -> Answer:
        Scores.of(contribution.body, self._classes)
        return Answer(contribution)

    def _end(self, state: Any, reason: str) -> RunEnd:
        refusals = self._take_refusals()
        return RunEnd(fence=self._desk.fence, state=state, reason=reason[:REASON_LENGTH], refusals=refusals)

    # ---- asking and reporting --------------------------------------------------------------------------------------

    def _standing(self) -> tuple[tuple[Member, ...], dict[str, str]]:
        """The sites that may be asked now, and why those that had consented may not."""
        run = self._watch.refresh(at_once=True)
        now = standing(run, self._desk.nodes(), self._key.public.key_id, self._clock.now())
        return now.members, dict(now.left_out)

    def _cohort(
        self, number: int, name: str, needed: int | None = None, *, everybody: bool = False
    ) -> tuple[tuple[Member, ...], dict[str, str]]:
        members, left_out = self._standing()
        least = self._options.min_sites if needed is None else needed
        if len(members) < least:
            raise TooFewSites(too_few(name, Collected({}, {}), left_out, least), needed=least)
        if everybody:
            return members, left_out
        return sample(members, self._options.fraction, least, self._options.seed, number), left_out

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

    def _collect(
        self,
        question: Question,
        members: Sequence[Member],
        accept: Accept,
        given: Mapping[str, Answer] | None = None,
        on_asked: Callable[[], None] = lambda: None,
    ) -> Collected:
        collector = Collector(
            exchange=self._exchange,
            watch=self._watch,
            key=self._key,
            clock=self._clock,
            nodes=self._desk.nodes,
            online=self._desk.online,
            accept=accept,
            refuse=self._refuse,
        )
        return collector.collect(question, members, given or {}, on_asked)

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

    def _announce(self, opened: _Opened, members: Sequence[Member]) -> None:
        sites = tuple(SiteRound(site=member.site) for member in members)
        report = RoundReport(fence=0, state=RoundState.OPEN, opened_at=opened.at, sites=sites)
        self._report(opened.number, report)
        self._log.info("round.opened", round=opened.number, sites=[member.site for member in members])

    def _round_report(
        self,
        state: RoundState,
        opened: _Opened,
        collected: Collected,
        left_out: Mapping[str, str],
        before: Checkpoint,
        *,
        digest: str | None = None,
    ) -> RoundReport:
        return round_report(
            state,
            self._timing(opened),
            site_rounds(collected, left_out, self._classes),
            scores_of(collected, self._classes),
            self._classes,
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
        return round_report(RoundState.CLOSED, timing, sites, [], self._classes, digest=digest, refusals=refusals)

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


def _with_content(_: Member, contribution: Contribution) -> Answer:
    if not contribution.body.content_digest:
        raise UpdateMissing(f"{contribution.body.site} made initial weights, but does not say which.")
    return Answer(contribution)


def _require_usable(weights: Path) -> None:
    """Refuse base weights that are no packed file or hold NaN: against themselves every change must be zero."""
    check_contribution(weights, WeightsFile.at(weights).layout, weights, whose="the base weights")


def _outlier_reasons(norms: Mapping[str, float]) -> dict[str, str]:
    reason = "its update has a norm of {:.4g}, far above the others'"
    return {site: reason.format(norms[site]) for site in sorted(norm_outliers(norms))}


def _envelope_path(folder: Path, site: str) -> Path:
    return folder / f"{site}.json"
