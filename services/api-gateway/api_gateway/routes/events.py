"""The event log: listed, live, signed and countersigned."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from api_gateway import audit, events
from api_gateway.http import CallDep, StrictRoute
from api_gateway.hub import MAX_STREAMS
from api_gateway.work import ANYBODY, READERS, Call
from medhive.errors import MedHiveError, Unavailable
from medhive.states import Role
from medhive.wire import Countersignature, EventAnswer, Head

router = APIRouter(tags=["events"], route_class=StrictRoute)
STREAM = "text/event-stream"
MAX_EVENT_NUMBER = 2**53
SIGN_OF_LIFE_S = 10.0  # a proxy must not take a quiet stream for a dead one, nor a revoked caller listen on
BATCH = 200  # rows that a stream sends before it looks at the caller's token again
After = Annotated[int, Query(ge=0, le=MAX_EVENT_NUMBER)]
Limit = Annotated[int, Query(ge=1, le=events.MAX_LISTED)]
LastEventId = Annotated[str | None, Header(max_length=32)]


@router.get(
    "/events",
    response_model=list[EventAnswer],
    responses={200: {"content": {STREAM: {"schema": {"type": "string"}}}}},
)
async def list_events(
    request: Request, call: CallDep, after: After = 0, limit: Limit = 200, last_event_id: LastEventId = None
) -> Any:
    """Rows after a number; with `Accept: text/event-stream` the live stream, resumable by `Last-Event-ID`."""
    if STREAM not in request.headers.get("Accept", ""):
        return await run_in_threadpool(_listed, call, after, limit)
    numbered = last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit()
    start = min(int(last_event_id or 0), MAX_EVENT_NUMBER) if numbered else after
    await run_in_threadpool(_listed, call, start, 1)  # refuses before the stream begins
    if call.gateway.hub.streams >= MAX_STREAMS or call.gateway.hub.closing:
        raise Unavailable("The gateway has no room for another event stream; poll, or try again in a minute.")
    return StreamingResponse(_stream(call, start), media_type=STREAM)


def _listed(call: Call, after: int, limit: int) -> list[EventAnswer]:
    with call.read(*ANYBODY) as work:
        return events.listed(work.session, work.caller.role, work.caller.site, after, limit)


def _batch(call: Call, after: int) -> tuple[list[EventAnswer], int]:
    """The next rows that the caller may see, and up to where the log has been looked through."""
    with call.read(*ANYBODY) as work:
        head = events.head_number(work.session)
        rows = events.listed(work.session, work.caller.role, work.caller.site, after, BATCH)
        return rows, rows[-1].number if len(rows) == BATCH else max(head, after)


async def _stream(call: Call, after: int) -> AsyncIterator[str]:
    hub = call.gateway.hub
    hub.streams += 1
    try:
        yield ": connected\n\n"
        while not hub.closing:
            bell = hub.bell
            try:
                rows, after = await run_in_threadpool(_batch, call, after)
            except MedHiveError:
                return  # the token ended; the next connection is told why
            for row in rows:
                yield f"id: {row.number}\nevent: {row.kind}\ndata: {json.dumps(row.model_dump(mode='json'))}\n\n"
            if not rows:
                yield ": \n\n"
            if len(rows) < BATCH:
                await hub.wait(bell, SIGN_OF_LIFE_S)
    finally:
        hub.streams -= 1


@router.get("/events/head")
def head(call: CallDep) -> Head:
    """The newest row's number and hash, under the coordinator's signature."""
    with call.read(*ANYBODY) as work:
        return events.signed_head(work.session, work.gateway.key, work.now)


@router.post("/events/countersign", status_code=204)
def countersign(body: Countersignature, call: CallDep) -> Response:
    """A hospital's signature under a head that it has seen."""
    with call.write(Role.SITE) as work:
        audit.countersign(work, body)
    return Response(status_code=204)


@router.get("/events/countersignatures")
def countersignatures(call: CallDep) -> list[Countersignature]:
    """All countersignatures that are kept."""
    with call.read(*READERS) as work:
        return audit.countersignatures(work)
