"""Who takes part in a round: the sites whose consent holds now, and the sample of them that is asked.

Pure decisions, without a clock or a network of their own, so that a resumed round asks the same sites.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from medhive.consent import check_consent
from medhive.errors import MedHiveError
from medhive.signing import VerifyKey
from medhive.states import ConsentState
from medhive.wire import ConsentAnswer, RunAnswer


@dataclass(frozen=True)
class Member:
    """A site that may be asked: its Flower node, and the consent key that its answers must carry."""

    site: str
    node_id: int
    key: VerifyKey


@dataclass(frozen=True)
class Standing:
    """All sites of a run at one moment: `members` in the order of their names, and why each other one is left out."""

    members: tuple[Member, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Present:
    """The same by names alone: `sites` that may be asked, in the order of names, and why each other one may not."""

    sites: tuple[str, ...]
    left_out: Mapping[str, str]

    def apart(self, evaluators: frozenset[str]) -> "tuple[Present, Present]":
        """Those who train, and those who only evaluate."""
        return self._only(lambda site: site not in evaluators), self._only(lambda site: site in evaluators)

    def _only(self, wanted: Callable[[str], bool]) -> "Present":
        left_out = {site: reason for site, reason in self.left_out.items() if wanted(site)}
        return Present(tuple(filter(wanted, self.sites)), left_out)


def standing(
    run: RunAnswer,
    nodes: Mapping[str, int],
    outdated: Mapping[str, str],
    coordinator_key_ids: Sequence[str],
    now: datetime,
) -> Standing:
    """Sort a run's sites into those that may be asked now and those that may not.

    Args:
        run: with its consents, which are checked again here: the gateway's word alone addresses nobody.
        nodes: site to the id of its registered node; a revoked site has none.
        outdated: sites whose version does not fit, and why: what they trained could not be read.
        coordinator_key_ids: of the keys that a consent may name: the present one, and those that it has followed.
        now: the time to judge validity by.
    """
    members, left_out = [], {}
    for answer in sorted(run.consents, key=lambda item: item.site):
        found = outdated.get(answer.site) or _member(run, answer, nodes, coordinator_key_ids, now)
        if isinstance(found, Member):
            members.append(found)
        else:
            left_out[answer.site] = found
    return Standing(tuple(members), left_out)


def _member(
    run: RunAnswer, answer: ConsentAnswer, nodes: Mapping[str, int], coordinator_key_ids: Sequence[str], now: datetime
) -> Member | str:
    if answer.state != ConsentState.GRANTED:
        return NO_CONSENT[answer.state]
    if answer.consent is None or answer.consent_public_key is None:
        return "its consent is not on record"
    try:
        key = VerifyKey.from_text(answer.consent_public_key)
        check_consent(
            answer.consent,
            key,
            site=answer.site,
            run_id=run.id,
            spec_hash=run.spec_hash,
            rounds=run.rounds,
            coordinator_key_ids=coordinator_key_ids,
            now=now,
        )
    except MedHiveError as error:
        return f"its consent does not hold: {error}"
    if answer.site not in nodes:
        return "it has no registered node; it was revoked, has left, or never connected"
    return Member(answer.site, nodes[answer.site], key)


NO_CONSENT: Mapping[ConsentState, str] = {
    ConsentState.PENDING: "it has not answered the request for consent",
    ConsentState.DECLINED: "it declined",
    ConsentState.WITHDRAWN: "it withdrew its consent",
}


def sample(sites: Sequence[str], fraction: float, least: int, seed: int, round_number: int) -> tuple[str, ...]:
    """Draw the cohort of one round, in the order of names.

    `fraction` of the sites, rounded up, and at least `least` where there are as many. The draw depends on seed, round
    and the sites' number and names alone, so that a resumed round draws the same.
    """
    count = min(len(sites), max(least, math.ceil(fraction * len(sites))))
    if count == len(sites):
        return tuple(sites)
    drawn = random.Random(f"{seed}/{round_number}").sample(range(len(sites)), count)  # noqa: S311 - no secret
    return tuple(sites[place] for place in sorted(drawn))
