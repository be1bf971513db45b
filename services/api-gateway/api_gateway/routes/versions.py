"""Model versions: history, bytes, comparison, offers, decisions; clean-up and statistics."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from api_gateway import blobs, statistics, versions
from api_gateway.files import file_answer
from api_gateway.http import CallDep, StrictRoute, VersionNumber
from api_gateway.runs import MAX_NUMBER
from api_gateway.sealed import require_sealed, sealed_answer
from api_gateway.work import ANYBODY, READERS
from medhive.sealing import REQUEST_HEADER
from medhive.spec import Name
from medhive.states import Role
from medhive.wire import (
    Cleanup,
    CleanupAnswer,
    Comparison,
    Decision,
    Export,
    Manifest,
    Statistics,
    VersionAnswer,
)

router = APIRouter(tags=["versions"], route_class=StrictRoute)
StudyName = Annotated[Name, Path()]
Compared = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("/studies/{study}/versions")
def list_versions(study: StudyName, call: CallDep) -> list[VersionAnswer]:
    """A study's versions, newest first."""
    with call.read(*ANYBODY) as work:
        return versions.listed(work, study)


@router.get("/studies/{study}/versions/{version}")
def show_version(study: StudyName, version: VersionNumber, call: CallDep) -> VersionAnswer:
    """One version."""
    with call.read(*ANYBODY) as work:
        return versions.to_answer(work, versions.get(work, study, version))


@router.get("/studies/{study}/versions/{version}/manifest")
def manifest(study: StudyName, version: VersionNumber, call: CallDep) -> Manifest:
    """What goes with the weights, under the coordinator's signature."""
    with call.read(*ANYBODY) as work:
        return Manifest.model_validate(versions.get(work, study, version).manifest)


@router.head("/studies/{study}/versions/{version}/file", response_class=Response, include_in_schema=False)
@router.get("/studies/{study}/versions/{version}/file", response_class=Response, responses={200: BINARY, 206: BINARY})
def download(study: StudyName, version: VersionNumber, request: Request, call: CallDep) -> Response:
    """The weights; Range is honoured."""
    with call.read(*ANYBODY) as work:
        row = versions.get(work, study, version)
        path, digest = blobs.version_blob(work, row), row.digest
        if require_sealed(work, request, REQUEST_HEADER) and request.method == "GET":
            return sealed_answer(work, request, path)
    return file_answer(call.gateway, request, path, digest, f"{study}_v{version}.safetensors")


@router.get("/studies/{study}/compare")
def compare(study: StudyName, a: Compared, b: Compared, call: CallDep) -> Comparison:
    """Two versions side by side."""
    with call.read(*ANYBODY) as work:
        return versions.compare(work, study, a, b)


@router.post("/studies/{study}/versions/{version}/offer")
def offer(study: StudyName, version: VersionNumber, call: CallDep) -> VersionAnswer:
    """Make an older version the candidate again."""
    with call.write(Role.ADMIN) as work:
        return versions.offer(work, study, version)


@router.post("/studies/{study}/versions/{version}/export")
def export(study: StudyName, version: VersionNumber, body: Export, call: CallDep) -> VersionAnswer:
    """Offer a version to one site."""
    with call.write(Role.ADMIN) as work:
        return versions.export(work, study, version, body.site)


@router.post("/studies/{study}/versions/{version}/decisions")
def decide(study: StudyName, version: VersionNumber, body: Decision, call: CallDep) -> VersionAnswer:
    """A hospital's signed decision."""
    with call.write(Role.SITE) as work:
        return versions.decide(work, study, version, body)


@router.get("/statistics")
def show_statistics(call: CallDep) -> Statistics:
    """Figures over everything."""
    with call.read(*READERS) as work:
        return statistics.compute(work)


@router.post("/cleanup")
def clean_up(body: Cleanup, call: CallDep) -> CleanupAnswer:
    """Retire old versions and delete what nothing refers to."""
    with call.write(Role.ADMIN) as work:
        answer = versions.clean_up(work, body)
    if not body.dry_run:
        blobs.sweep(call.gateway)
    return answer
