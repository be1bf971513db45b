"""The contribution queue: /upload, /download and /status, what admins do with it, and the aggregator's averages."""

from pathlib import Path as File
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api_gateway import blobs, contributions, executions, queues, versions
from api_gateway.blobstore import Part
from api_gateway.files import file_answer
from api_gateway.http import BlobDigest, CallDep, StrictRoute
from api_gateway.routes.blobs import BINARY, content_length, received
from api_gateway.runs import MAX_NUMBER
from api_gateway.sealed import opener_of, require_sealed, sealed_answer
from api_gateway.work import ANYBODY, Call, Work
from medhive.consent import Consent
from medhive.errors import InvalidInput, NotFound
from medhive.queues import (
    MANIFEST_HEADER,
    UPLOAD,
    ExecutionAnswer,
    ExecutionEnd,
    ExecutionTask,
    QueueAnswer,
    QueueConsentAnswer,
    QueueContribution,
    QueueContributionAnswer,
    QueueOptions,
    QueueStatus,
    manifest_from_header,
)
from medhive.sealing import REQUEST_HEADER, SEAL_HEADER, Opener
from medhive.spec import Name
from medhive.states import Role
from medhive.wire import Fenced, LeaseRequest, Reason

router = APIRouter(tags=["queues"], route_class=StrictRoute)
"""Of the versioned API."""
root = APIRouter(tags=["queues"], route_class=StrictRoute)
"""What has its place at the root of the address, where hospitals' own programs may call it too."""
StudyName = Annotated[Name, Path()]
ExecutionNumber = Annotated[int, Path(ge=1, le=MAX_NUMBER)]
VersionFilter = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]
Limit = Annotated[int, Query(ge=1, le=1000)]
VERSION_HEADER = "MedHive-Model-Version"
ZERO = "/studies/{study}/queue/version-zero/blobs/{digest}"
RESULT = "/server/queue/executions/{number}/blobs/{digest}"
REST: dict[int | str, dict[str, Any]] = {404: {"description": "Not here; Upload-Offset says how much of it is."}}
SENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "This part is kept; more is to come."},
    201: {"description": "Complete."},
}
BODY = {"requestBody": {"required": True, **BINARY}}


# ---- /upload -------------------------------------------------------------------------------------------------------


@root.head(UPLOAD, responses=REST)
def ask_upload(request: Request, call: CallDep) -> Response:
    """Whether this contribution is here, or how much of it."""
    manifest = manifest_from_header(request.headers.get(MANIFEST_HEADER))
    with call.read(Role.SITE) as work:
        require_sealed(work, request, SEAL_HEADER)
        if contributions.find(work, manifest) is not None:
            return Response()
        upload = contributions.upload_of(work, manifest)
    return _rest(call, upload, manifest.body.content_digest)


def _rest(call: Call, place: File, digest: str) -> Response:
    return Response(status_code=404, headers={"Upload-Offset": str(call.gateway.blobs.resume_at(place, digest))})


@root.post(UPLOAD, response_model=QueueContributionAnswer, status_code=201, responses=SENT, openapi_extra=BODY)
async def upload(request: Request, call: CallDep, study: Name | None = None) -> Response:
    """A contribution's weights (safetensors), whole or in parts of at most 8 MiB (Content-Range), with its signed manifest.

    The manifest stands in the header `MedHive-Contribution`. The last part completes the contribution, and the answer to it
    acknowledges that it counts; the same contribution may be sent again.
    """
    part = Part.parse(request.headers.get("Content-Range"), content_length(request))
    manifest = manifest_from_header(request.headers.get(MANIFEST_HEADER))
    if study not in (None, manifest.body.study):
        raise InvalidInput(f"The manifest is for the study {manifest.body.study}, the upload for {study}.")
    begun = await run_in_threadpool(_begin_upload, call, request, manifest, part)
    if isinstance(begun, QueueContributionAnswer):
        return _json(begun, 200)
    place, opener = begun
    acknowledged: list[QueueContributionAnswer] = []
    more = await received(
        call, request, place, part, opener, lambda: acknowledged.append(contributions.keep(call, place, manifest))
    )
    return more or _json(acknowledged[0], 201)


def _json(answer: QueueContributionAnswer, status: int) -> Response:
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")


def _begin_upload(
    call: Call, request: Request, manifest: QueueContribution, part: Part
) -> QueueContributionAnswer | tuple[File, Opener | None]:
    with call.read(Role.SITE) as work:
        known = contributions.find(work, manifest)
        if known is not None:
            return contributions.to_answer(work, known)
        place = contributions.begin(work, manifest, part)
        return place, _opener(work, request, part)


def _opener(work: Work, request: Request, part: Part) -> Opener | None:
    return opener_of(work, request, part) if require_sealed(work, request, SEAL_HEADER) else None


# ---- /download and /status -----------------------------------------------------------------------------------------


@root.head("/download", response_class=Response, include_in_schema=False)
@root.get("/download", response_class=Response, responses={200: BINARY, 206: BINARY, 304: {"description": "The same."}})
def download(request: Request, call: CallDep, study: Name | None = None) -> Response:
    """The newest global model; the entity tag is its SHA-256, and Range is honoured."""
    with call.read(*ANYBODY) as work:
        name = queues.only_study(work, study)
        work.study(name)
        version = versions.newest(work, name)
        if version is None:
            raise NotFound(f"The study {name} has no model yet.", study=name)
        path, digest, number = blobs.version_blob(work, version), version.digest, version.number
        if require_sealed(work, request, REQUEST_HEADER) and request.method == "GET":
            return sealed_answer(work, request, path)
    file_name = f"{name}_v{number}.safetensors"
    if f'"{digest}"' in request.headers.get("If-None-Match", ""):
        answer = Response(status_code=304, headers={"ETag": f'"{digest}"'})
    else:
        answer = file_answer(call.gateway, request, path, digest, file_name)
    answer.headers[VERSION_HEADER] = str(number)
    # Another version may be the newest at the next look.
    answer.headers["Cache-Control"] = "private, no-cache"
    return answer


@root.get("/status")
def status(call: CallDep, study: Name | None = None) -> QueueStatus:
    """How full the queue is; without a login only the numbers."""
    if call.token is None:
        with call.anonymous(call.gateway.database.read) as work:
            return queues.status(work, queues.only_study(work, study, anybody=True), anonymous=True)
    with call.read(*ANYBODY) as work:
        return queues.status(work, queues.only_study(work, study))


# ---- the queue itself ----------------------------------------------------------------------------------------------


@router.get("/studies/{study}/queue")
def show_queue(study: StudyName, call: CallDep) -> QueueAnswer:
    """A study's open queue: its specification and who has agreed to it."""
    with call.read(*ANYBODY) as work:
        return queues.to_answer(work, queues.get(work, study))


@router.put("/studies/{study}/queue")
def open_queue(study: StudyName, body: QueueOptions, call: CallDep) -> QueueAnswer:
    """Open a study's queue."""
    with call.write(Role.ADMIN) as work:
        return queues.open_queue(work, study, body)


@router.post("/studies/{study}/queue/close")
def close_queue(study: StudyName, body: Reason, call: CallDep) -> QueueAnswer:
    """Close it; what waits is cleared with the reason."""
    with call.write(Role.ADMIN) as work:
        return queues.close(work, study, body.reason)


@router.post("/studies/{study}/queue/consents")
def answer_consent(study: StudyName, body: Consent, call: CallDep) -> QueueConsentAnswer:
    """A hospital's signed yes, no, or no longer."""
    with call.write(Role.SITE) as work:
        return queues.answer_consent(work, study, body)


@router.post("/studies/{study}/queue/execute", status_code=202)
def execute(study: StudyName, call: CallDep) -> ExecutionAnswer:
    """Average what waits, now."""
    with call.write(Role.ADMIN) as work:
        return executions.execute(work, study)


@router.post("/studies/{study}/queue/clear")
def clear(study: StudyName, body: Reason, call: CallDep) -> QueueStatus:
    """Throw away what waits, with a reason."""
    with call.write(Role.ADMIN) as work:
        return queues.clear(work, study, body.reason)


@router.get("/studies/{study}/queue/executions")
def list_executions(study: StudyName, call: CallDep, limit: Limit = 200) -> list[ExecutionAnswer]:
    """The averages, newest first."""
    with call.read(*ANYBODY) as work:
        return executions.listed(work, study, limit)


@router.get("/studies/{study}/queue/contributions")
def list_contributions(
    study: StudyName, call: CallDep, version: VersionFilter = None, limit: Limit = 200
) -> list[QueueContributionAnswer]:
    """Contributions, newest first, of one version its lineage; a hospital sees its own."""
    with call.read(*ANYBODY) as work:
        return contributions.listed(work, study, version, limit)


@router.head(ZERO, responses=REST)
def ask_version_zero(study: StudyName, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """Whether the study has these initial weights, or how much of them has come from this site."""
    with call.read(Role.SITE) as work:
        require_sealed(work, request, SEAL_HEADER)
        queues.get(work, study)
        present = versions.find(work, study, 0)
        if present is not None and present.digest == digest:
            return Response()
        place = contributions.zero_upload(work, study, digest)
    return _rest(call, place, digest)


@router.put(ZERO, status_code=201, responses=SENT, openapi_extra=BODY)
async def send_version_zero(study: StudyName, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """A study's initial weights, by the first member that trains."""
    part = Part.parse(request.headers.get("Content-Range"), content_length(request))

    def begin() -> tuple[File | None, Opener | None]:
        with call.read(Role.SITE) as work:
            place = contributions.begin_version_zero(work, study, digest, part)
            return place, _opener(work, request, part) if place else None

    place, opener = await run_in_threadpool(begin)
    if place is None:
        return Response(status_code=201)
    more = await received(
        call, request, place, part, opener, lambda: contributions.keep_version_zero(call, place, study, digest)
    )
    return more or Response(status_code=201)


# ---- the aggregator ------------------------------------------------------------------------------------------------


@router.post(
    "/server/queue/lease", response_model=ExecutionTask, responses={204: {"description": "No average is due."}}
)
def lease(body: LeaseRequest, call: CallDep) -> ExecutionTask | Response:
    """Take up an average that is due, or one whose holder died."""
    with call.write(Role.SERVER) as work:
        return executions.lease(work, body) or Response(status_code=204)


@router.post("/server/queue/executions/{number}/look")
def look(number: ExecutionNumber, body: Fenced, call: CallDep) -> ExecutionTask:
    """Keep a lease alive and see what is to be averaged now."""
    with call.write(Role.SERVER) as work:
        return executions.look(work, number, body.fence)


@router.post("/server/queue/executions/{number}/end")
def end(number: ExecutionNumber, body: ExecutionEnd, call: CallDep) -> ExecutionAnswer:
    """The average is made, or cannot be made."""
    with call.write(Role.SERVER) as work:
        return executions.end(work, number, body)


@router.head(RESULT, responses=REST)
def ask_result(number: ExecutionNumber, digest: BlobDigest, call: CallDep) -> Response:
    """Whether the average is here, or how much of it."""
    with call.read(Role.SERVER) as work:
        row, _ = executions.get(work, number)
        if row.result_digest == digest and work.gateway.blobs.has(digest):
            return Response()
        place = executions.result_upload(work, number, digest)
    return _rest(call, place, digest)


@router.get(RESULT, response_class=Response, responses={200: BINARY, 206: BINARY})
def fetch(number: ExecutionNumber, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """The bytes of a contribution, or of the version that it began from; Range is honoured."""
    with call.read(Role.SERVER) as work:
        path = executions.readable(work, number, digest)
    return file_answer(call.gateway, request, path, digest)


@router.put(RESULT, status_code=201, responses=SENT, openapi_extra=BODY)
async def send_result(number: ExecutionNumber, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """The average's weights."""
    part = Part.parse(request.headers.get("Content-Range"), content_length(request))

    def begin() -> File:
        with call.read(Role.SERVER) as work:
            executions.get(work, number)
            return executions.result_upload(work, number, digest)

    place = await run_in_threadpool(begin)
    more = await received(
        call, request, place, part, None, lambda: executions.keep_result(call.gateway, place, number, digest)
    )
    return more or Response(status_code=201)
