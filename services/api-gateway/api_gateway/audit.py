"""Countersigned heads: what makes a shortened or rewritten event log show.

A signature that does not agree with this log is kept all the same, and becomes an event: it is exactly what an auditor looks
for. Of each hospital the newest signatures are kept, beside those that disagree.
"""

from sqlalchemy import delete, select

from api_gateway.events import Kind
from api_gateway.models import CountersignatureRow, Event
from api_gateway.work import Work
from medhive.chain import ZERO_HASH
from medhive.errors import BadSignature, InvalidInput
from medhive.wire import Countersignature

KEPT_PER_SITE = 1000  # one each ten seconds for hours; an older one says nothing that a newer one does not
MAX_EVENT_NUMBER = 2**53
MAX_DISPUTES_PER_SITE = 100  # beyond which a hospital's disagreement is known well enough


def countersign(work: Work, body: Countersignature) -> None:
    """Keep a hospital's signature under a head.

    Raises:
        BadSignature: another key, or another site's name.
        InvalidInput: a number that no log reaches.
    """
    site = work.own_site()
    seen = body.verify(work.consent_key(site))
    if seen.site != site:
        raise BadSignature(f"The countersignature is {seen.site}'s, not {site}'s.", site=seen.site)
    if seen.number > MAX_EVENT_NUMBER:
        raise InvalidInput("The event log has no such number.")
    if work.session.get(CountersignatureRow, (site, seen.number)) is None:
        _keep(work, site, body)


def _keep(work: Work, site: str, body: Countersignature) -> None:
    number, digest = body.body.number, body.body.hash
    row = work.session.get(Event, number)
    agrees = digest == (row.hash if row else ZERO_HASH if number == 0 else None)
    if not agrees and _disputes(work, site) >= MAX_DISPUTES_PER_SITE:
        return
    document = body.model_dump(mode="json")
    work.session.add(
        CountersignatureRow(site=site, number=number, agrees=agrees, document=document, received_at=work.now)
    )
    if not agrees:
        work.record(Kind.HEAD_DISPUTED, f"event {number}", site=site, number=number, seen=digest)
    else:
        _drop_old(work, site, number)


def _disputes(work: Work, site: str) -> int:
    query = select(CountersignatureRow.number).where(CountersignatureRow.site == site, ~CountersignatureRow.agrees)
    return len(work.session.scalars(query.limit(MAX_DISPUTES_PER_SITE)).all())


def _drop_old(work: Work, site: str, newest: int) -> None:
    # Every event counts one number at least, so that this keeps no more than KEPT_PER_SITE rows.
    old = (CountersignatureRow.site == site) & (CountersignatureRow.number <= newest - KEPT_PER_SITE)
    statement = delete(CountersignatureRow).where(old, CountersignatureRow.agrees)
    work.session.execute(statement.execution_options(synchronize_session="fetch"))


def countersignatures(work: Work) -> list[Countersignature]:
    """All that are kept, by site and number."""
    query = select(CountersignatureRow).order_by(CountersignatureRow.site, CountersignatureRow.number)
    return [Countersignature.model_validate(row.document) for row in work.session.scalars(query)]
