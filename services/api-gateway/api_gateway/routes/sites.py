"""Hospitals: invites, joins, tokens, standing; and their nodes for the aggregator."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from api_gateway import sites
from api_gateway.http import CallDep, StrictRoute
from api_gateway.runs import MAX_NUMBER
from api_gateway.work import ANYBODY, READERS
from medhive.signing import Signed
from medhive.spec import Name
from medhive.states import Role
from medhive.wire import (
    InviteAnswer,
    Join,
    JoinAnswer,
    LeaveBody,
    NewInvite,
    NodeAnswer,
    NodeReport,
    Reason,
    SiteAnswer,
    SiteTokenProof,
    TokenAnswer,
)

router = APIRouter(tags=["sites"], route_class=StrictRoute)
SiteName = Annotated[Name, Path()]


@router.get("/invites")
def list_invites(call: CallDep) -> list[InviteAnswer]:
    """Invites, newest first; without their secrets."""
    with call.read(*READERS) as work:
        return sites.invites(work)


@router.post("/invites", status_code=201)
def invite(body: NewInvite, call: CallDep) -> InviteAnswer:
    """Invite a hospital; the JOIN_TOKEN is in this answer alone."""
    with call.write(Role.ADMIN) as work:
        return sites.invite(work, body)


@router.delete("/invites/{number}", status_code=204)
def withdraw_invite(number: Annotated[int, Path(ge=1, le=MAX_NUMBER)], call: CallDep) -> Response:
    """Make an unused invite worthless."""
    with call.write(Role.ADMIN) as work:
        sites.withdraw_invite(work, number)
    return Response(status_code=204)


@router.post("/join", status_code=201)
def join(body: Join, call: CallDep) -> JoinAnswer:
    """Join with an invite and proofs of both keys."""
    return sites.join(call, body)


@router.post("/site-token")
def site_token(body: Signed[SiteTokenProof], call: CallDep) -> TokenAnswer:
    """A fresh token for a site's machine, for its signature."""
    return sites.site_token(call, body)


@router.get("/sites")
def list_sites(call: CallDep) -> list[SiteAnswer]:
    """The sites that the caller may see."""
    with call.read(*ANYBODY) as work:
        return sites.listed(work)


@router.get("/sites/{site}")
def show_site(site: SiteName, call: CallDep) -> SiteAnswer:
    """One site."""
    with call.read(*ANYBODY) as work:
        return sites.to_answer(work, work.site(site))


@router.post("/sites/{site}/revoke")
def revoke(site: SiteName, body: Reason, call: CallDep) -> SiteAnswer:
    """Take a hospital out at once and for good."""
    with call.write(Role.ADMIN) as work:
        return sites.revoke(work, site, body.reason)


@router.post("/sites/{site}/leave")
def leave(site: SiteName, body: Signed[LeaveBody], call: CallDep) -> SiteAnswer:
    """A hospital goes for good, by its own signed wish."""
    with call.write(Role.SITE) as work:
        return sites.leave(work, site, body)


@router.get("/server/nodes")
def nodes(call: CallDep) -> list[NodeAnswer]:
    """The node keys that should, or should no longer, be registered at the SuperLink."""
    with call.read(Role.SERVER) as work:
        return sites.nodes(work)


@router.put("/server/nodes/{site}", status_code=204)
def report_node(site: SiteName, body: NodeReport, call: CallDep) -> Response:
    """What the SuperLink says of a node."""
    with call.write(Role.SERVER) as work:
        sites.report_node(work, site, body)
    return Response(status_code=204)
