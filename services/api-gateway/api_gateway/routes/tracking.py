"""Who may look at MLflow: asked by the proxy before it passes an exchange on to the tracking server.

A browser sends name and password with every one of a page's dozens of requests; the slow check of a password is therefore
remembered for a minute, under a hash, in this process alone.
"""

import base64
import binascii
import time
from collections import OrderedDict
from hashlib import sha256
from threading import Lock

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from api_gateway import accounts
from api_gateway.http import CallDep
from medhive.errors import NotAllowed, NotAuthenticated
from medhive.states import Role
from medhive.wire import Login

REMEMBERED_S = 60.0  # how long a changed password or a disabled account may still look
REMEMBERED = 1000  # logins at one time
MAX_HEADER = 2048
NO_CONTENT = 204
READERS = (Role.ADMIN, Role.ANALYST)
CHALLENGE = {"WWW-Authenticate": 'Basic realm="MedHive", charset="UTF-8"'}

router = APIRouter(include_in_schema=False)


class Remembered:
    """Hashes of what was checked lately, with the role it led to."""

    def __init__(self) -> None:
        self._roles: OrderedDict[bytes, tuple[float, Role]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes) -> Role | None:
        """The role, when it is no older than `REMEMBERED_S`."""
        with self._lock:
            found = self._roles.get(key)
        return found[1] if found and time.monotonic() - found[0] < REMEMBERED_S else None

    def put(self, key: bytes, role: Role) -> None:
        """Remember; the oldest is forgotten when there are too many."""
        with self._lock:
            self._roles[key] = (time.monotonic(), role)
            while len(self._roles) > REMEMBERED:
                self._roles.popitem(last=False)


@router.get("/internal/mlflow-access")
def mlflow_access(request: Request, call: CallDep) -> Response:
    """204 for an admin or an analyst, by name and password (RFC 7617)."""
    header = request.headers.get("Authorization", "")
    key = sha256(header.encode()).digest()
    remembered: Remembered = request.app.state.mlflow_logins
    role = remembered.get(key)
    if role is None:
        try:
            role = accounts.check_password(call, _credentials(header))
        except NotAuthenticated:
            return Response(status_code=401, headers=CHALLENGE)
        remembered.put(key, role)
    if role not in READERS:
        raise NotAllowed("Only admins and analysts may look at MLflow.")
    return Response(status_code=NO_CONTENT)


def _credentials(header: str) -> Login:
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic" or len(header) > MAX_HEADER:
        raise NotAuthenticated("Log in with name and password.")
    try:
        name, separator, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        if separator:
            return Login(username=name, password=password)
    except (binascii.Error, UnicodeDecodeError, ValidationError):
        pass
    raise NotAuthenticated("Log in with name and password.")
