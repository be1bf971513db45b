"""The sites of a real run: consenting hospitals behind Flower, with their signatures, and their updates in the blob store.

An update counts with its hospital's own signature alone, which is kept beside it until the round closes: a process that is
started anew verifies both again and asks only those whose answers it lacks.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from fl_server.checkpoint import no_space_named, write_durably
from fl_server.cohort import Member, Present, standing
from fl_server.collect import Accept, Answer, Clock, Collected, Collector, Exchange, Question, Watch
from fl_server.gateway import NodeDesk
from fl_server.rounds import Check, Refuse, UpdateMissing
from medhive.envelope import Contribution, ContributionBody, TaskType, check_contribution_envelope, from_bytes, to_bytes
from medhive.errors import MedHiveError, NotFound, TooLarge
from medhive.signing import SigningKey

HEADER_ROOM_BYTES = 1024 * 1024
"""How much longer an update may be than its base: texts in the header differ, numbers do not."""

log = structlog.get_logger()


class Hospitals:
    """`fl_server.rounds.Sites` over a network.

    Args:
        desk: the gateway, for this run and lease.
        exchange: the way to the nodes.
        key: the coordinator's, signs every task.
        watch: the run as it stands, with its consents.
        clock: time.
    """

    def __init__(self, *, desk: NodeDesk, exchange: Exchange, key: SigningKey, watch: Watch, clock: Clock) -> None:
        self._desk = desk
        self._exchange = exchange
        self._key = key
        self._key_ids = desk.key_ids(key.public)
        self._watch = watch
        self._clock = clock
        self._members: dict[str, Member] = {}

    def present(self) -> Present:
        """The sites whose consent holds now, and why those of others does not; raises as `Watch.refresh`."""
        run = self._watch.refresh(at_once=True)
        now = standing(run, self._desk.nodes(), self._desk.outdated(), self._key_ids, self._clock.now())
        self._members = {member.site: member for member in now.members}
        return Present(tuple(self._members), dict(now.left_out))

    def ask(
        self,
        question: Question,
        sites: Sequence[str],
        check: Check,
        refuse: Refuse,
        on_asked: Callable[[], None],
    ) -> Collected:
        """Ask those of whom there is no verified answer yet; see `fl_server.rounds.Sites.ask`."""

        def accept(_: Member, contribution: Contribution) -> Answer:
            return self._accept(question, contribution, check)

        members = [self._members[site] for site in sites]
        kept = self._kept(question, members, accept)
        collector = Collector(
            exchange=self._exchange,
            watch=self._watch,
            key=self._key,
            clock=self._clock,
            nodes=self._desk.nodes,
            online=self._desk.online,
            accept=accept,
            refuse=refuse,
        )
        return collector.collect(question, members, kept, on_asked)

    def _accept(self, question: Question, contribution: Contribution, check: Check) -> Answer:
        """Fetch what came with a verified contribution and check it; keep the signed contribution beside the file."""
        body = contribution.body
        if question.updates is None or body.type is TaskType.EVALUATE:
            return check(body, None)
        path = self._fetch(question, body, question.updates)
        try:
            answer = check(body, path)
        except MedHiveError:
            path.unlink(missing_ok=True)
            raise
        write_durably(_envelope_path(question.updates, body.site), to_bytes(contribution))
        return answer

    def _fetch(self, question: Question, body: ContributionBody, folder: Path) -> Path:
        largest = question.base_size_bytes + HEADER_ROOM_BYTES
        if not body.content_digest:
            raise UpdateMissing(f"{body.site} answered without an update.")
        if body.content_size_bytes > largest:
            raise TooLarge(f"The update has {body.content_size_bytes} bytes, its base {question.base_size_bytes}.")
        path = folder / f"{body.site}.safetensors"
        try:
            with no_space_named(path):
                self._desk.fetch(body.content_digest, path, largest)
        except NotFound as error:
            raise UpdateMissing("The update that the contribution names is not in the blob store.") from error
        except MedHiveError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _kept(self, question: Question, members: Sequence[Member], accept: Accept) -> Mapping[str, Answer]:
        """The answers of this very round that a former process verified; each is verified again."""
        kept: dict[str, Answer] = {}
        folder = question.updates
        if folder is None:
            return kept
        for member in members:
            path = _envelope_path(folder, member.site)
            if not path.exists():
                continue
            try:
                contribution = from_bytes(Contribution, path.read_bytes())
                check_contribution_envelope(contribution, member.key, question.to(member.site, self._clock.now()))
                kept[member.site] = accept(member, contribution)
            except MedHiveError as error:
                log.warning(
                    "contribution.discarded",
                    run_id=question.run_id,
                    study=question.study,
                    site=member.site,
                    round=question.round,
                    reason=str(error),
                )
                path.unlink(missing_ok=True)
        return kept


def _envelope_path(folder: Path, site: str) -> Path:
    return folder / f"{site}.json"
