"""The bytes of weights: asked for, sent in parts, fetched from anywhere in the middle."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api_gateway import blobs
from api_gateway.blobstore import Part
from api_gateway.files import file_answer
from api_gateway.http import BlobDigest, CallDep, RunId, StrictRoute, number_of
from api_gateway.work import Call
from medhive.errors import InvalidInput, TooSlow
from medhive.states import Role

router = APIRouter(tags=["blobs"], route_class=StrictRoute)
PATH = "/runs/{run_id}/blobs/{digest}"
MAY = (Role.SERVER, Role.SITE)
BUFFER_BYTES = 1024**2  # what is written at a time
BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.head(PATH, responses={404: {"description": "Not here; Upload-Offset says how much of it is."}})
def ask(run_id: RunId, digest: BlobDigest, call: CallDep) -> Response:
    """Whether the blob is there, or how much of it."""
    number = number_of(run_id)
    with call.read(*MAY) as work:
        run = blobs.open_run(work, number)
        store = work.gateway.blobs
        if blobs.readable(work, run, digest):
            size = store.path(digest).stat().st_size
            return Response(headers={"Content-Length": str(size), "Accept-Ranges": "bytes"})
        offset = store.offset(store.upload_path(blobs.owner_of(work), run_id, digest))
    return Response(status_code=404, headers={"Upload-Offset": str(offset)})


@router.get(PATH, response_class=Response, responses={200: BINARY, 206: BINARY})
def fetch(run_id: RunId, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """The bytes; Range is honoured."""
    with call.read(*MAY) as work:
        path = blobs.require_readable(work, number_of(run_id), digest)
    return file_answer(call.gateway, request, path, digest)


@router.put(
    PATH,
    status_code=201,
    responses={200: {"description": "This part is kept; more is to come."}, 201: {"description": "Complete."}},
    openapi_extra={"requestBody": {"required": True, **BINARY}},
)
async def send(run_id: RunId, digest: BlobDigest, request: Request, call: CallDep) -> Response:
    """One part of at most 8 MiB; Content-Range says which. The last one completes the blob."""
    part = Part.parse(request.headers.get("Content-Range"), _length(request))
    upload, owner = await run_in_threadpool(_begin, call, number_of(run_id), digest, part)
    store = call.gateway.blobs
    lock = store.upload_lock(upload)
    await run_in_threadpool(lock.__enter__)
    try:
        await _append(call, request, upload, part)
        if part.stop < part.total:
            return Response(status_code=200, headers={"Upload-Offset": str(part.stop)})
        await run_in_threadpool(blobs.keep, call.gateway, upload, number_of(run_id), digest, owner)
    finally:
        lock.__exit__(None, None, None)
    return Response(status_code=201, headers={"Location": str(request.url.path)})


def _length(request: Request) -> int | None:
    text = request.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _begin(call: Call, number: int, digest: str, part: Part) -> tuple[Path, str]:
    with call.read(*MAY) as work:
        return blobs.begin_part(work, number, digest, part)


async def _append(call: Call, request: Request, upload: Path, part: Part) -> None:
    received = 0
    buffer = bytearray()
    with call.gateway.blobs.appending(upload, part) as write:
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
