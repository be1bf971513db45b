"""The sites of a simulated run: clients in this process, one after the other, each doing what a hospital's trainer does.

The round loop asks them as it asks hospitals; only the envelopes, signatures and transfers between them are left out. Model
and data stay resident, and a client exists only while it is its turn: what it must remember from round to round (its
optimiser's state, where the task keeps one) lies on disk, so that memory does not grow with the number of clients.
"""

import math
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fl_client.local_round import (
    LocalRound,
    Memory,
    has_training_examples,
    local_round,
    local_rounds_together,
    memory_file,
    needed_memory,
    newest_memory,
    validated,
    with_own,
)
from fl_client.tasks import RoundPlan, Together, Workspace, completed
from fl_server.checkpoint import no_space_named, write_durably
from fl_server.cohort import Present, sample
from fl_server.collect import REASON_LENGTH, Answer, Collected, Question
from fl_server.rounds import Check, Refuse
from medhive.envelope import ContributionBody, TaskType
from medhive.errors import MedHiveError, NoSpace
from medhive.packing import Flat, overwrite_weights, read_weights, write_weights
from medhive.spec import RunOptions
from medhive.version import PROTOCOL
from simulator.faults import Fate, Fates, poisoned
from simulator.federation import Federation
from simulator.memory import keep_freed_memory

MAX_JUDGES = 1000
"""Clients that judge the final weights: what more would add to the mean is below a tenth of a per cent."""

OnClient = Callable[[int, int], None]
"""Told of (done, asked) clients of a round."""


class ClientStates:
    """What clients keep from round to round, on disk. Bound to its round, as at a hospital, so that a resume repeats it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, client: str, before: int) -> bytes | None:
        """The state of the client's optimiser after its own last round before this one."""
        path = newest_memory(self._folder / client, Memory.OPTIMISER, before)
        return path.read_bytes() if path is not None else None

    def own(self, client: str, before: int) -> Mapping[str, Flat]:
        """The layers that the client keeps to itself, as its own last round before this one left them."""
        path = newest_memory(self._folder / client, Memory.OWN, before)
        return read_weights(path) if path is not None else {}

    def save(self, client: str, round_number: int, result: LocalRound) -> None:
        """Keep what a client remembers of a round, and of the one before it for a resume. Raises `NoSpace`."""
        if result.optimiser_state is None and result.own is None:
            return
        folder = self._folder / client
        folder.mkdir(parents=True, exist_ok=True)
        keep = needed_memory(folder, round_number)
        for path in folder.glob("*.safetensors"):
            if path not in keep:
                path.unlink()
        if result.optimiser_state is not None:
            write_durably(memory_file(folder, Memory.OPTIMISER, round_number), result.optimiser_state)
        if result.own is not None:
            write_weights(memory_file(folder, Memory.OWN, round_number), dict(result.own))

    def remove(self) -> None:
        """Delete them all: the run is over."""
        shutil.rmtree(self._folder, ignore_errors=True)


class InlineSites:
    """`fl_server.rounds.Sites` without a network.

    Args:
        federation: who there is, and their data.
        options: of the run.
        fates: what goes wrong with whom.
        states: what clients remember; None lets them forget.
        on_client: told of progress.
        room: a folder for the updates of a round, each written over one of the round before, which is cheaper than a new
            file; None for new files.
        together: how many clients are trained as one computation.
    """

    def __init__(
        self,
        federation: Federation,
        options: RunOptions,
        fates: Fates,
        states: ClientStates | None,
        *,
        on_client: OnClient,
        room: Path | None = None,
        together: int = 1,
    ) -> None:
        keep_freed_memory()
        self._federation = federation
        self._options = options
        self._fates = fates
        self._states = states
        self._on_client = on_client
        self._room = room
        if room is not None:
            with no_space_named(room):
                room.mkdir(exist_ok=True)
        self._in_room = 0
        self._together = together
        self._ahead: dict[str, LocalRound | MedHiveError] = {}
        self._names = tuple(federation.names)

    def _place(self, site: str) -> int:
        """Where it stands in the order of names; searched, so that a hundred thousand need no table."""
        return bisect_left(self._names, site)

    def present(self) -> Present:
        """All of them: a client that drops out does so when it is asked."""
        return Present(self._names, {})

    def ask(
        self,
        question: Question,
        sites: Sequence[str],
        check: Check,
        refuse: Refuse,
        on_asked: Callable[[], None],
    ) -> Collected:
        """Have one client after the other answer; see `fl_server.rounds.Sites.ask`."""
        on_asked()
        self._in_room = 0
        sites = self.those_asked(question, sites)
        base = read_weights(question.base) if question.base is not None else {}
        collected = Collected({}, {})
        for done, site in enumerate(sites, 1):
            if self._together > 1 and question.type is TaskType.TRAIN and site not in self._ahead:
                self._train_ahead(question, sites[done - 1 :], base)
            try:
                collected.answers[site] = self._answer(question, site, base, check, refuse)
            except NoSpace:
                raise
            except MedHiveError as error:
                collected.dropped[site] = str(error)[:REASON_LENGTH]
            self._on_client(done, len(sites))
        return collected.sort()

    def _answer(self, question: Question, site: str, base: Mapping[str, Flat], check: Check, refuse: Refuse) -> Answer:
        """One client's answer, checked.

        Raises:
            MedHiveError: why it does not count.
        """
        fate = self.fate(question, site)
        if fate.lost:
            raise Lost(fate.lost)
        try:
            body, path = self.do(question, site, base, fate)
        except NoSpace:
            raise
        except MedHiveError as error:
            raise Lost(f"failed ({error.code}): {error}") from error
        return counted(site, body, path, check, refuse)

    def those_asked(self, question: Question, sites: Sequence[str]) -> Sequence[str]:
        """All of them, but for the final judgement, which a sample gives as well."""
        if question.type is not TaskType.EVALUATE:
            return sites
        return sample(sites, MAX_JUDGES / max(MAX_JUDGES, len(sites)), 1, self._options.seed, 0)

    def fate(self, question: Question, site: str) -> Fate:
        """What becomes of a site's answer to a question: faults are of training alone."""
        return self._fates.of(self._place(site), question.round) if question.type is TaskType.TRAIN else Fate()

    def do(
        self, question: Question, site: str, base: Mapping[str, Flat], fate: Fate
    ) -> tuple[ContributionBody, Path | None]:
        """One client's work: what it says, and the file of its update where it trained.

        Raises:
            MedHiveError: it cannot, by cause.
        """
        began = time.monotonic()
        workspace = self._federation.workspace(self._place(site), wrong=fate.poison == "labels")
        if question.statistics:
            workspace.use_statistics({name: np.asarray(values) for name, values in question.statistics.items()})
        if question.type is TaskType.TRAIN and question.updates is not None:
            weights, content = self._train(question, site, base, fate, workspace)
            path = self._path_of_update(question.updates, site)
            # Neither synced nor hashed: after a crash the round is done again.
            overwrite_weights(path, weights)
            return _body(question, site, began, **content), path
        if question.type is TaskType.STATISTICS:
            sums = workspace.statistics() or {}
            told = {name: [float(x) for x in values.ravel()] for name, values in sums.items()}
            return _body(question, site, began, statistics=told), None
        own = self._states.own(site, question.round + 1) if self._states else {}
        judged = completed(validated(workspace, with_own(base, own)))
        return _body(
            question, site, began, metrics=judged.metrics, confusion=judged.confusion, examples=judged.examples
        ), None

    def _path_of_update(self, updates: Path, site: str) -> Path:
        if self._room is None:
            return updates / f"{site}.safetensors"
        self._in_room += 1
        return self._room / f"{self._in_room}.safetensors"

    def _train_ahead(self, question: Question, sites: Sequence[str], base: Mapping[str, Flat]) -> None:
        """Train the next few clients that will answer and have examples to train on, as one computation."""
        chosen: dict[str, Together] = {}
        for site in sites:
            fate = self._fates.of(self._place(site), question.round)
            workspace = self._federation.workspace(self._place(site), wrong=fate.poison == "labels")
            if not fate.lost and isinstance(workspace, Together) and has_training_examples(workspace):
                chosen[site] = workspace
            if len(chosen) == self._together:
                break
        if len(chosen) > 1:
            plans = [self._plan(question, site, None) for site in chosen]
            rounds = local_rounds_together(list(chosen.values()), base, plans)
            self._ahead = dict(zip(chosen, rounds, strict=True))

    def _train(
        self, question: Question, site: str, base: Mapping[str, Flat], fate: Fate, workspace: Workspace
    ) -> tuple[Mapping[str, Flat], dict[str, Any]]:
        """The weights that the client sends, and what it says with them."""
        ahead = self._ahead.pop(site, None)
        if isinstance(ahead, MedHiveError):
            raise ahead
        result = ahead or self._train_alone(question, site, base, workspace)
        if self._states:
            self._states.save(site, question.round, result)
        weights: Mapping[str, Flat] = result.weights
        if fate.poison:
            place = self._place(site)
            weights = poisoned(fate.poison, base, weights, [self._options.seed, question.round, place])
        metrics = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
        said = {"examples": result.examples, "rate_sum": result.rate_sum}
        return weights, {**said, "metrics": metrics, "confusion": result.confusion}

    def _train_alone(self, question: Question, site: str, base: Mapping[str, Flat], workspace: Workspace) -> LocalRound:
        state = self._states.load(site, question.round) if self._states else None
        plan, own = self._plan(question, site, state), self._own(question, site)
        return completed(local_round(workspace, base, plan, own))

    def _own(self, question: Question, site: str) -> Mapping[str, Flat] | None:
        if not self._options.keeps_own_layers:
            return None
        return self._states.own(site, question.round) if self._states else {}

    def _plan(self, question: Question, site: str, state: bytes | None) -> RoundPlan:
        correction = question.corrections.get(site)
        plan = _plan(question, self._options, state)
        return replace(plan, correction=read_weights(correction.path)) if correction is not None else plan


def counted(site: str, body: ContributionBody, path: Path | None, check: Check, refuse: Refuse) -> Answer:
    """An answer that was checked.

    Raises:
        MedHiveError: it does not count; its file is gone, and `refuse` has heard.
    """
    try:
        return check(body, path)
    except MedHiveError as error:
        refuse(site, error.code)
        if path is not None:
            path.unlink(missing_ok=True)
        raise


class Lost(MedHiveError):
    """A simulated client gave no answer."""

    code = "client-lost"


def _plan(question: Question, options: RunOptions, state: bytes | None) -> RoundPlan:
    return RoundPlan(
        round=question.round,
        rounds=question.rounds,
        local_epochs=options.local_epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        mu=options.local_mu,
        seed=options.seed,
        optimiser_state=state,
        penalty=options.penalty,
        C=options.C,
    )


def _body(question: Question, site: str, began: float, **content: Any) -> ContributionBody:
    """What a hospital would sign; nobody here has a key. Taken as it is, since this process made it."""
    return ContributionBody.model_construct(
        protocol=PROTOCOL,
        type=question.type,
        run_id=question.run_id,
        site=site,
        round=question.round,
        spec_hash=question.spec_hash,
        base_digest=question.base_digest,
        training_s=time.monotonic() - began,
        issued_at=datetime.now(UTC),
        **content,
    )
