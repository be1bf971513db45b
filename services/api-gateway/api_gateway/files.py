"""Answers that are files: from Python, or, where a proxy stands in front, from the proxy itself."""

from pathlib import Path

from fastapi import Request, Response
from starlette.responses import FileResponse

from api_gateway.http import came_through_proxy
from api_gateway.work import Gateway


class WeightsFile(FileResponse):
    """A file in pieces of a mebibyte: a hop between threads for each costs little then."""

    chunk_size = 1024 * 1024


def file_answer(gateway: Gateway, request: Request, path: Path, digest: str, name: str | None = None) -> Response:
    """A blob's bytes. They never change under their name, so that the digest is the perfect entity tag."""
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, max-age=31536000, immutable"}
    prefix = gateway.settings.accel_prefix
    if prefix is not None and request.method == "GET" and came_through_proxy(request, gateway):
        inside = path.relative_to(gateway.state.blobs)
        return Response(headers={**headers, "X-Accel-Redirect": f"{prefix.rstrip('/')}/{inside}"})
    return WeightsFile(path, headers=headers, media_type="application/octet-stream", filename=name)
