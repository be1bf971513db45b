"""Studies, their members, and the requests for runs."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from api_gateway import members, requests, studies
from api_gateway.http import CallDep, RequestId, StrictRoute, number_of
from api_gateway.work import ANYBODY
from medhive.spec import Name
from medhive.states import RequestState, Role
from medhive.wire import NewRequest, NewStudy, Reason, RequestAnswer, StudyAnswer

router = APIRouter(tags=["studies"], route_class=StrictRoute)
StudyName = Annotated[Name, Path()]
SiteName = Annotated[Name, Path()]
MAX_LISTED = 1000
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]


@router.get("/studies")
def list_studies(call: CallDep) -> list[StudyAnswer]:
    """The studies that the caller may see."""
    with call.read(*ANYBODY) as work:
        return studies.listed(work)


@router.post("/studies", status_code=201)
def create_study(body: NewStudy, call: CallDep) -> StudyAnswer:
    """Make a study."""
    with call.write(Role.ADMIN) as work:
        return studies.create(work, body)


@router.get("/studies/{study}")
def show_study(study: StudyName, call: CallDep) -> StudyAnswer:
    """One study."""
    with call.read(*ANYBODY) as work:
        return studies.to_answer(work, work.study(study))


@router.put("/studies/{study}/members/{site}")
def add_member(study: StudyName, site: SiteName, call: CallDep) -> StudyAnswer:
    """Let a site take part."""
    with call.write(Role.ADMIN) as work:
        row = work.study(study)
        members.add(work, study, site)
        return studies.to_answer(work, row)


@router.delete("/studies/{study}/members/{site}", status_code=204)
def remove_member(study: StudyName, site: SiteName, call: CallDep) -> Response:
    """End a site's part."""
    with call.write(Role.ADMIN) as work:
        work.study(study)
        members.remove(work, study, site)
    return Response(status_code=204)


@router.get("/requests")
def list_requests(
    call: CallDep, study: Name | None = None, state: RequestState | None = None, limit: Limit = 200
) -> list[RequestAnswer]:
    """Training requests, newest first."""
    with call.read(*ANYBODY) as work:
        return requests.listed(work, study, state, limit)


@router.post("/requests", status_code=201)
def send_request(body: NewRequest, call: CallDep) -> RequestAnswer:
    """Ask for a run."""
    with call.write(Role.ADMIN, Role.SITE) as work:
        return requests.send(work, body)


@router.get("/requests/{request_id}")
def show_request(request_id: RequestId, call: CallDep) -> RequestAnswer:
    """One request."""
    with call.read(*ANYBODY) as work:
        return requests.to_answer(work, requests.get(work, number_of(request_id)))


@router.post("/requests/{request_id}/approve")
def approve(request_id: RequestId, body: Reason, call: CallDep) -> RequestAnswer:
    """Approve; the answer names the run."""
    with call.write(Role.ADMIN) as work:
        return requests.approve(work, number_of(request_id), body.reason)


@router.post("/requests/{request_id}/reject")
def reject(request_id: RequestId, body: Reason, call: CallDep) -> RequestAnswer:
    """Reject with a reason."""
    with call.write(Role.ADMIN) as work:
        return requests.reject(work, number_of(request_id), body.reason)


@router.post("/requests/{request_id}/cancel")
def cancel(request_id: RequestId, body: Reason, call: CallDep) -> RequestAnswer:
    """Take a request back."""
    with call.write(Role.ADMIN, Role.SITE) as work:
        return requests.cancel(work, number_of(request_id), body.reason)
