"""Which hospitals take part in which study, and what ends for a hospital that no longer does."""

from sqlalchemy import select

from api_gateway import queues, runs, versions
from api_gateway.events import Kind
from api_gateway.models import ConsentRow, Member, Run, Site
from api_gateway.work import Work
from medhive.errors import Conflict, NotFound
from medhive.states import FINAL_RUN_STATES, ConsentState, SiteState


def add(work: Work, study: str, site: str) -> None:
    """Let a site take part; the present candidate waits for its decision too.

    Raises:
        NotFound: there is no such site.
        Conflict: it was revoked or has left.
    """
    row = work.session.get(Site, site)
    if row is None:
        raise NotFound(f"There is no site {site}; invite it first.", site=site)
    if row.state in (SiteState.REVOKED, SiteState.LEFT):
        raise Conflict(f"Site {site} is {row.state}.", site=site)
    if work.is_member(study, site):
        return
    work.session.add(Member(study=study, site=site, added_at=work.now))
    work.session.flush()
    versions.await_decision_on_candidate(work, study, site)
    work.record(Kind.STUDY_MEMBER_ADDED, f"study {study}", study=study, site=site)


def remove(work: Work, study: str, site: str) -> None:
    """End a site's part: its consents to open runs end with it."""
    member = work.session.get(Member, (study, site))
    if member is None:
        raise NotFound(f"Site {site} takes no part in the study {study}.", site=site, study=study)
    end_consents(work, study, site, "the site no longer takes part in the study")
    work.session.delete(member)
    work.record(Kind.STUDY_MEMBER_REMOVED, f"study {study}", study=study, site=site)


def end_consents(work: Work, study: str, site: str, reason: str) -> None:
    """Decline what the site has not answered and withdraw what it has granted, in all runs that are not over.

    What waits of it in the study's queue is taken out.
    """
    queues.end_part(work, study, site, reason)
    query = select(ConsentRow, Run).join(Run, Run.id == ConsentRow.run_id)
    query = query.where(Run.study == study, ConsentRow.site == site, Run.state.not_in(FINAL_RUN_STATES))
    for consent, run in work.session.execute(query).all():
        if consent.state == ConsentState.PENDING:
            runs.settle_consent(work, run, consent, ConsentState.DECLINED, reason)
        elif consent.state == ConsentState.GRANTED:
            runs.settle_consent(work, run, consent, ConsentState.WITHDRAWN, reason)
