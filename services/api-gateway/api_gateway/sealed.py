"""Sealed transfers at the gateway: when they are required, who may ask for them, and their bytes.

The proxy cannot send what is sealed for one reader, so Python does, a chunk at a time.
"""

from collections.abc import Iterator
from pathlib import Path

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from api_gateway.blobstore import Part
from api_gateway.models import Site
from api_gateway.sites import require_fresh
from api_gateway.work import Work
from medhive.errors import SealBroken, SealedOnly
from medhive.sealing import (
    REQUEST_HEADER,
    SEAL_HEADER,
    Opener,
    SealContext,
    Sealer,
    request_from,
    seal_from,
    sealed_length,
    to_header,
)
from medhive.signing import VerifyKey
from medhive.wire import AddressTrust

MEDIA_TYPE = "application/octet-stream"


def require_sealed(work: Work, request: Request, header: str) -> bool:
    """Whether this exchange is sealed, as its header says.

    Whoever comes to the address of a tunnel that ends TLS comes through it.

    Raises:
        SealedOnly: it is not, and would be read on its way.
    """
    if header in request.headers:
        return True
    if work.gateway.address_trust(request.headers.get("Host", "")) is AddressTrust.TUNNEL:
        raise SealedOnly(
            "This coordinator is reached through a tunnel that others can read, so weights pass only sealed for one "
            "hospital: upgrade MedHive at the hospital; people fetch weights on the coordinator's own machine."
        )
    return False


def sealed_answer(work: Work, request: Request, path: Path) -> Response:
    """A file from where the reader has it on, sealed for the key that it sent.

    Raises:
        SealBroken, BadSignature, ClockSkew: the request is not this site's, not for this, or old.
    """
    statement = request_from(request.headers.get(REQUEST_HEADER))
    context = statement.verify(_site_key(work)).context
    _check(work, request, context, reader=context.reader_public_key)
    size = path.stat().st_size
    if context.start >= size:
        return Response(status_code=416)
    sealer = Sealer(context, work.gateway.key)
    length = size - context.start
    headers = {SEAL_HEADER: to_header(sealer.seal), "Content-Length": str(sealed_length(length))}
    return StreamingResponse(_chunks(sealer, path, context.start, length), headers=headers, media_type=MEDIA_TYPE)


def _chunks(sealer: Sealer, path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        yield from sealer.chunks(file, length)


def opener_of(work: Work, request: Request, part: Part) -> Opener:
    """What opens a part that a site has sealed for this coordinator.

    Raises:
        SealBroken, BadSignature, ClockSkew: the seal is not this site's, not for this part, or old.
    """
    seal = seal_from(request.headers.get(SEAL_HEADER))
    context = seal.body.context
    _check(work, request, context, reader=work.gateway.state.sealing_key.public)
    if (context.start, context.stop) != (part.start, part.stop):
        raise SealBroken("The seal was made for another part than this one.")
    return Opener(seal, context, _site_key(work), work.gateway.state.sealing_key)


def _site_key(work: Work) -> VerifyKey:
    return VerifyKey.from_text(str(work.session.get_one(Site, work.own_site()).consent_public_key))


def _check(work: Work, request: Request, context: SealContext, *, reader: str) -> None:
    wanted = (request.method, request.url.path, work.own_site(), work.gateway.key.public.key_id, reader)
    given = (context.method, context.path, context.site, context.coordinator_key_id, context.reader_public_key)
    if wanted != given:
        raise SealBroken("The seal was made for another transfer than this one.")
    require_fresh(work, context.issued_at)
