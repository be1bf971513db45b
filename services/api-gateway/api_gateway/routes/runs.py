"""Runs, consents, activity; and the aggregator's leases and reports."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import AwareDatetime, Field

from api_gateway import leases, runs
from api_gateway.http import CallDep, RunId, StrictRoute, number_of
from api_gateway.work import ANYBODY
from medhive.consent import Consent
from medhive.spec import MAX_ROUNDS, Frozen, Name
from medhive.states import Role, RunState
from medhive.wire import (
    ActivityReport,
    ConsentAnswer,
    Fenced,
    Lease,
    LeaseRequest,
    Reason,
    RoundAnswer,
    RoundReport,
    RunAnswer,
    RunEnd,
    VersionAnswer,
    VersionZero,
)

router = APIRouter(tags=["runs"], route_class=StrictRoute)
MAX_LISTED = 1000
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
RoundNumber = Annotated[int, Path(ge=0, le=MAX_ROUNDS)]


class TrackingReport(Frozen):
    """POST /server/runs/{run}/mlflow: where the tracking server shows the run."""

    mlflow_run_id: str = Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")


@router.get("/runs")
def list_runs(
    call: CallDep,
    study: Name | None = None,
    state: RunState | None = None,
    changed_after: AwareDatetime | None = None,
    limit: Limit = 200,
) -> list[RunAnswer]:
    """Runs, newest first; with `changed_after`, those changed since, in the order of their change."""
    runs.settle_due(call.gateway)
    with call.read(*ANYBODY) as work:
        return runs.listed(work, study, state, changed_after, limit)


@router.get("/runs/{run_id}")
def show_run(run_id: RunId, call: CallDep) -> RunAnswer:
    """One run, with consents and who does what right now."""
    runs.settle_due(call.gateway)
    with call.read(*ANYBODY) as work:
        return runs.to_answer(work, runs.get(work, number_of(run_id)))


@router.get("/runs/{run_id}/rounds")
def list_rounds(run_id: RunId, call: CallDep) -> list[RoundAnswer]:
    """A run's rounds."""
    with call.read(*ANYBODY) as work:
        return runs.rounds(work, number_of(run_id))


@router.get("/runs/{run_id}/rounds.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
def table_of_rounds(run_id: RunId, call: CallDep) -> Response:
    """A run's curves as a table, for who may see what all hospitals gave."""
    with call.read(Role.ADMIN, Role.ANALYST) as work:
        text = runs.table_of_rounds(work, number_of(run_id))
    saved_as = {"Content-Disposition": f'attachment; filename="{run_id}_rounds.csv"'}
    return Response(text, media_type="text/csv", headers=saved_as)


@router.post("/runs/{run_id}/stop")
def stop(run_id: RunId, body: Reason, call: CallDep) -> RunAnswer:
    """Stop a run."""
    with call.write(Role.ADMIN) as work:
        return runs.stop(work, number_of(run_id), body.reason)


@router.get("/runs/{run_id}/consents")
def list_consents(run_id: RunId, call: CallDep) -> list[ConsentAnswer]:
    """Who has said what; a hospital sees its own."""
    with call.read(*ANYBODY) as work:
        return runs.consents(work, number_of(run_id))


@router.post("/runs/{run_id}/consents")
def answer_consent(run_id: RunId, body: Consent, call: CallDep) -> ConsentAnswer:
    """A hospital's signed yes or no."""
    runs.settle_due(call.gateway)
    with call.write(Role.SITE) as work:
        return runs.answer_consent(work, number_of(run_id), body)


@router.post("/runs/{run_id}/withdraw")
def withdraw(run_id: RunId, body: Consent, call: CallDep) -> ConsentAnswer:
    """A hospital takes its consent back."""
    with call.write(Role.SITE) as work:
        return runs.withdraw(work, number_of(run_id), body)


@router.post("/runs/{run_id}/activity", status_code=204)
def report_activity(run_id: RunId, body: ActivityReport, call: CallDep) -> Response:
    """What a consenting site does right now."""
    with call.touch(Role.SITE) as work:
        runs.report_activity(work, number_of(run_id), body)
    return Response(status_code=204)


# ---- the aggregator ------------------------------------------------------------------------------------------------


@router.post("/server/lease", response_model=Lease, responses={204: {"description": "No run is waiting."}})
def lease(body: LeaseRequest, call: CallDep) -> Lease | Response:
    """Take up a ready run, or one whose holder died."""
    runs.settle_due(call.gateway)
    with call.write(Role.SERVER) as work:
        return leases.lease(work, body) or Response(status_code=204)


@router.post("/server/runs/{run_id}/heartbeat")
def heartbeat(run_id: RunId, body: Fenced, call: CallDep) -> RunAnswer:
    """Keep a lease alive and hear what has changed."""
    with call.touch(Role.SERVER) as work:
        return leases.heartbeat(work, number_of(run_id), body.fence)


@router.post("/server/runs/{run_id}/start")
def start(run_id: RunId, body: Fenced, call: CallDep) -> RunAnswer:
    """The run begins."""
    with call.write(Role.SERVER) as work:
        return leases.start(work, number_of(run_id), body.fence)


@router.put("/server/runs/{run_id}/rounds/{number}")
def report_round(run_id: RunId, number: RoundNumber, body: RoundReport, call: CallDep) -> RunAnswer:
    """One round's report; idempotent."""
    with call.write(Role.SERVER) as work:
        return leases.report_round(work, number_of(run_id), number, body)


@router.post("/server/runs/{run_id}/version-zero")
def version_zero(run_id: RunId, body: VersionZero, call: CallDep) -> VersionAnswer:
    """The study's initial weights."""
    with call.write(Role.SERVER) as work:
        return leases.version_zero(work, number_of(run_id), body)


@router.post("/server/runs/{run_id}/end")
def end(run_id: RunId, body: RunEnd, call: CallDep) -> RunAnswer:
    """The run is over; a completed one makes the next version."""
    with call.write(Role.SERVER) as work:
        return leases.end(work, number_of(run_id), body)


@router.post("/server/runs/{run_id}/mlflow")
def tracked(run_id: RunId, body: TrackingReport, call: CallDep) -> RunAnswer:
    """Where the tracking server shows the run."""
    with call.write(Role.SERVER) as work:
        return leases.tracked(work, number_of(run_id), body.mlflow_run_id)
