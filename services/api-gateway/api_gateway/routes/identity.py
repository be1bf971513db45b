"""Who this is, logins and accounts."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from api_gateway import accounts, auth, sites
from api_gateway.http import CallDep, StrictRoute
from api_gateway.work import ANYBODY, PEOPLE_AND_SITES, READERS
from medhive.spec import Frozen, Name
from medhive.states import Role
from medhive.wire import AccountAnswer, CoordinatorAnswer, Login, NewAccount, TokenAnswer, TunnelAnswer

router = APIRouter(tags=["identity"], route_class=StrictRoute)
Username = Annotated[Name, Path()]


class NewPassword(Frozen):
    """POST /accounts/{username}/password: null makes one up."""

    password: str | None = Field(None, min_length=12, max_length=200)


@router.get("/coordinator")
def coordinator(
    request: Request, call: CallDep, nonce: Annotated[str, Query(pattern=r"^[0-9a-f]{0,64}$")] = ""
) -> CoordinatorAnswer:
    """Name, versions, key, CAs; signed over the nonce; open to everybody."""
    request.app.state.renewal.catch_up()
    return sites.coordinator(call.gateway, nonce, call.host)


@router.get("/tunnel")
def tunnel(call: CallDep) -> TunnelAnswer:
    """The tunnel's public address; admins and analysts."""
    with call.read(*READERS) as work:
        return sites.tunnel(work.gateway)


@router.post("/login")
def login(body: Login, call: CallDep) -> TokenAnswer:
    """A token for a password."""
    return accounts.login(call, body)


@router.post("/logout", status_code=204)
def logout(call: CallDep) -> Response:
    """Revoke the token that this is sent with."""
    with call.write(*ANYBODY) as work:
        accounts.logout(work)
    return Response(status_code=204)


@router.get("/accounts")
def list_accounts(call: CallDep) -> list[AccountAnswer]:
    """All accounts; admins."""
    with call.read(Role.ADMIN) as work:
        return accounts.listed(work)


@router.post("/accounts", status_code=201)
def create_account(body: NewAccount, call: CallDep) -> AccountAnswer:
    """Make an account; the password is made up when it is left out, and shown in this answer alone."""
    with call.read(Role.ADMIN):
        password = body.password or auth.new_password()
    hashed = auth.hash_password(password)
    with call.write(Role.ADMIN) as work:
        return accounts.create(work, body, password, hashed)


@router.delete("/accounts/{username}", status_code=204)
def disable_account(username: Username, call: CallDep) -> Response:
    """Take an account out of use."""
    with call.write(Role.ADMIN) as work:
        accounts.disable(work, username)
    return Response(status_code=204)


@router.post("/accounts/{username}/password")
def set_password(username: Username, body: NewPassword, call: CallDep) -> AccountAnswer:
    """Set a password; admins anybody's, others their own."""
    with call.read(*PEOPLE_AND_SITES) as work:
        accounts.require_own(work, username)
    password = body.password or auth.new_password()
    hashed = auth.hash_password(password)
    with call.write(*PEOPLE_AND_SITES) as work:
        return accounts.set_password(work, username, hashed, None if body.password else password)


@router.post("/accounts/{username}/revoke-tokens", status_code=204)
def revoke_tokens(username: Username, call: CallDep) -> Response:
    """Log an account out everywhere; admins."""
    with call.write(Role.ADMIN) as work:
        accounts.revoke_tokens(work, username)
    return Response(status_code=204)
