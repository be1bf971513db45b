"""The bytes of weights: asked for, sent in parts, fetched from anywhere in the middle."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api_gateway import blobs
from api_gateway.blobstore import Part
from api_gateway.files import file_answer
from api_gateway.http import BlobDigest, CallDep, RunId, StrictRoute, number_of
from api_gateway.sealed import opener_of, require_sealed, sealed_answer
from api_gateway.work import Call
from medhive.errors import InvalidInput, TooSlow
from medhive.sealing import REQUEST_HEADER, SEAL_HEADER, Opener, plain_length
from medhive.spec import Name
from medhive.states import Role

router = APIRouter(tags=["blobs"], route_class=StrictRoute)
PATH = "/runs/{run_id}/blobs/{digest}"
MAY = (Role.SERVER, Role.SITE)
Reader = Annotated[
    Name | None, Query(alias="site", description="The one site that may read it; the aggregator alone says so.")
]
BUFFER_BYTES = 1024**2  # what is written at a time
Write = Callable[[bytes], object]
BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.head(PATH, responses={404: {"description": "Not here; Upload-Offset says how much of it is."}})
def ask(run_id: RunId, digest: BlobDigest, request: Request, call: CallDep, reader: Reader = None) -> Response:
    """Whether the blob is there, or how much of it; who would send it as it is hears here already that it must be sealed."""
    number = number_of(run_id)
    with call.read(*MAY) as work:
        require_sealed(work, request, SEAL_HEADER)
        run = blobs.open_run(work, number)
        store = work.gateway.blobs
        there = blobs.is_kept_for(work, run, digest, reader) if reader else blobs.readable(work, run, digest)
        if there:
            size = store.path(digest).stat().st_size
            return Response(headers={"Content-Length": str(size), "Accept-Ranges": "bytes"})
        upload = store.upload_path(blobs.owner_of(work, reader), run_id, digest)
    return Response(status_code=404, headers={"Upload-Offset": str(store.resume_at(upload, digest))})


@router.get(PATH, response_class=Response, responses={200: BINARY, 206: BINARY})
def fetch(run_id: RunId, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """The bytes; Range is honoured."""
    with call.read(*MAY) as work:
        path = blobs.require_readable(work, number_of(run_id), digest)
        if require_sealed(work, request, REQUEST_HEADER):
            return sealed_answer(work, request, path)
    return file_answer(call.gateway, request, path, digest)


@router.put(
    PATH,
    status_code=201,
    responses={200: {"description": "This part is kept; more is to come."}, 201: {"description": "Complete."}},
    openapi_extra={"requestBody": {"required": True, **BINARY}},
)
async def send(run_id: RunId, digest: BlobDigest, request: Request, call: CallDep, reader: Reader = None) -> Response:
    """One part of at most 8 MiB; Content-Range says which. The last one completes the blob."""
    part = Part.parse(request.headers.get("Content-Range"), content_length(request))
    upload, owner, opener = await run_in_threadpool(_begin, call, request, number_of(run_id), digest, part, reader)
    done = await received(
        call, request, upload, part, opener, lambda: blobs.keep(call.gateway, upload, number_of(run_id), digest, owner)
    )
    return done or Response(status_code=201, headers={"Location": str(request.url.path)})


async def received(  # noqa: PLR0917
    call: Call, request: Request, upload: Path, part: Part, opener: Opener | None, complete: Callable[[], object]
) -> Response | None:
    """Append the body to an upload, and complete it after its last part; the answer when more is to come, else None.

    Raises:
        Conflict: the part does not begin where the last one ended.
        InvalidInput, SealBroken: the body is not what was announced; what has come before is kept.
        NoSpace: the disk is full.
    """
    lock = call.gateway.blobs.upload_lock(upload)
    await run_in_threadpool(lock.__enter__)
    try:
        await _append(call, request, upload, part, opener)
        if part.stop < part.total:
            return Response(status_code=200, headers={"Upload-Offset": str(part.stop)})
        await run_in_threadpool(complete)
    finally:
        lock.__exit__(None, None, None)
    return None


def content_length(request: Request) -> int | None:
    """The length of the content itself, which a sealed body is a little longer than."""
    text = request.headers.get("Content-Length", "")
    length = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
    return plain_length(length) if length is not None and SEAL_HEADER in request.headers else length


def _begin(  # noqa: PLR0917
    call: Call, request: Request, number: int, digest: str, part: Part, reader: str | None
) -> tuple[Path, str, Opener | None]:
    with call.read(*MAY) as work:
        upload, owner = blobs.begin_part(work, number, digest, part, reader)
        sealed = require_sealed(work, request, SEAL_HEADER)
        return upload, owner, opener_of(work, request, part) if sealed else None


async def _append(call: Call, request: Request, upload: Path, part: Part, opener: Opener | None) -> None:
    with call.gateway.blobs.appending(upload, part) as write:
        if opener is None:
            await _append_plain(request, write, part)
        else:
            await _append_sealed(request, write, opener)


async def _append_plain(request: Request, write: Write, part: Part) -> None:
    received = 0
    buffer = bytearray()
    try:
        async for chunk in request.stream():
            received += len(chunk)
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                await run_in_threadpool(write, bytes(buffer))
                buffer.clear()
    except (ClientDisconnect, TooSlow):
        # What has arrived is a valid prefix; the sender asks where to go on.
        await run_in_threadpool(write, bytes(buffer))
        raise
    await run_in_threadpool(write, bytes(buffer))
    if received != part.stop - part.start:
        raise InvalidInput("The body ended before what its Content-Length said.", received=received)


async def _append_sealed(request: Request, write: Write, opener: Opener) -> None:
    """Only what is authentic is written, so that a broken transfer leaves a valid prefix too."""
    async for piece in request.stream():
        for chunk in await run_in_threadpool(list, opener.feed(piece)):
            await run_in_threadpool(write, chunk)
    await run_in_threadpool(write, await run_in_threadpool(opener.finish))
