"""People's logins: made by admins, used by admins, analysts and the people of a hospital."""

from sqlalchemy import func, select
from sqlalchemy.exc import NoResultFound

from api_gateway import auth
from api_gateway.events import Kind
from api_gateway.models import Account, Site, Token
from api_gateway.work import Call, Work
from medhive.errors import Conflict, InvalidInput, NotAllowed, NotAuthenticated, NotFound
from medhive.states import Role, SiteState
from medhive.wire import AccountAnswer, Login, NewAccount, TokenAnswer

FIRST_ADMIN = "admin"
WRONG = "The name or the password is wrong."


def login(call: Call, body: Login) -> TokenAnswer:
    """Give a token for a password; the slow check runs outside the transactions.

    Raises:
        NotAuthenticated: name or password is wrong, or the account is disabled.
        TooManyAttempts: too many failures lately.
    """
    checked, _ = _checked(call, body)
    with call.anonymous(call.gateway.database.write, body.username) as work:
        account = _known(work, body.username)
        # An admin may have set another password, or taken the account out of use, while this one was being checked.
        if account.disabled or account.password_hash != checked:
            raise NotAuthenticated(WRONG)
        token = auth.issue(
            work,
            Role(account.role),
            account.username,
            auth.PERSON_TOKEN_LIFE,
            account=account.username,
            site=account.site,
        )
        work.record(Kind.LOGIN_SUCCEEDED, f"account {account.username}", site=account.site, source_address=work.source)
        return token


def check_password(call: Call, body: Login) -> Role:
    """The role of whom the password belongs to; no token is given, and only failures are events.

    Raises:
        NotAuthenticated: name or password is wrong, or the account is disabled.
        TooManyAttempts: too many failures lately.
    """
    return _checked(call, body)[1]


def _checked(call: Call, body: Login) -> tuple[str | None, Role]:
    """The hash that the password fits, and the account's role."""
    keys = auth.attempt_keys(body.username, call.source)
    with call.anonymous(call.gateway.database.read) as work:
        auth.require_not_throttled(work.session, work.now, keys)
        account = work.session.get(Account, body.username)
        hashed = account.password_hash if account and not account.disabled else None
        role = account.role if account else Role.SITE
    if not auth.password_fits(hashed, body.password):
        _login_failed(call, body.username, keys)
        raise NotAuthenticated(WRONG)
    return hashed, Role(role)


def logout(work: Work) -> None:
    """Revoke the token that the caller uses; the aggregator's is a file and stays."""
    token = work.session.get(Token, work.caller.token_id) if work.caller.token_id else None
    if token is not None:
        token.revoked_at = work.now


def _login_failed(call: Call, username: str, keys: tuple[tuple[str, int], ...]) -> None:
    count = auth.count_failure(call.gateway.database, call.gateway.clock(), keys)
    if count <= auth.REPORTED_PER_SOURCE:
        with call.anonymous(call.gateway.database.write) as work:
            work.record(Kind.LOGIN_FAILED, f"account {username}", source_address=work.source)


def _known(work: Work, username: str) -> Account:
    try:
        return work.session.get_one(Account, username)
    except NoResultFound as error:
        raise NotFound(f"There is no account {username}.", username=username) from error


def first_admin(work: Work, hashed: str) -> bool:
    """Make the first admin's account unless there is an account already."""
    if work.session.scalar(select(func.count()).select_from(Account)):
        return False
    account = Account(username=FIRST_ADMIN, role=Role.ADMIN, password_hash=hashed, created_at=work.now, disabled=False)
    work.session.add(account)
    key_id = work.gateway.key.public.key_id
    work.record(Kind.COORDINATOR_CREATED, f"coordinator {work.gateway.settings.coordinator_name}", key_id=key_id)
    work.record(Kind.ACCOUNT_CREATED, f"account {FIRST_ADMIN}", role=Role.ADMIN)
    return True


def create(work: Work, body: NewAccount, password: str, hashed: str) -> AccountAnswer:
    """Make an account; the password is in the answer only when it was made up here.

    Raises:
        Conflict: the name is taken.
        InvalidInput: a site account without a site, or a site for another role.
    """
    if (Role(body.role) is Role.SITE) != (body.site is not None):
        raise InvalidInput("An account of role site needs --site, and no other role has one.")
    if work.session.get(Account, body.username) is not None:
        raise Conflict(f"There is an account {body.username} already.", username=body.username)
    _require_site(work, body.site)
    account = Account(
        username=body.username,
        role=body.role,
        site=body.site,
        password_hash=hashed,
        created_at=work.now,
        disabled=False,
    )
    work.session.add(account)
    work.record(Kind.ACCOUNT_CREATED, f"account {body.username}", site=body.site, role=body.role)
    return to_answer(account, None if body.password else password)


def _require_site(work: Work, name: str | None) -> None:
    site = work.session.get(Site, name) if name else None
    if name and (site is None or site.state in (SiteState.REVOKED, SiteState.LEFT)):
        raise NotFound(f"There is no site {name} that takes part.", site=name)


def listed(work: Work) -> list[AccountAnswer]:
    """All accounts, by name."""
    return [to_answer(row) for row in work.session.scalars(select(Account).order_by(Account.username))]


def disable(work: Work, username: str) -> None:
    """Take an account out of use; its name stays taken, for the event log speaks of it.

    Raises:
        Conflict: it is the last admin.
    """
    account = _known(work, username)
    if account.role == Role.ADMIN and not account.disabled and _admins(work) == 1:
        raise Conflict("This is the last admin; make another one first.", username=username)
    account.disabled = True
    auth.revoke_tokens(work, account=username)
    work.record(Kind.ACCOUNT_DISABLED, f"account {username}", site=account.site)


def _admins(work: Work) -> int:
    query = select(func.count()).select_from(Account)
    return work.session.execute(query.where(Account.role == Role.ADMIN, Account.disabled.is_(False))).scalar_one()


def require_own(work: Work, username: str) -> None:
    """Refuse whoever is neither an admin nor this account's owner.

    Raises:
        NotAllowed: it is somebody else's account.
    """
    own = work.caller.name == username and work.caller.name != work.caller.site
    if not own and not work.caller.is_admin:
        raise NotAllowed("Only an admin can set another's password.")


def set_password(work: Work, username: str, hashed: str, generated: str | None) -> AccountAnswer:
    """Set a password and revoke all tokens; by an admin, who thereby enables the account again, or by its owner."""
    require_own(work, username)
    account = _known(work, username)
    account.password_hash = hashed
    account.disabled = account.disabled and not work.caller.is_admin
    auth.revoke_tokens(work, account=username)
    work.record(Kind.ACCOUNT_PASSWORD, f"account {username}", site=account.site)
    return to_answer(account, generated)


def revoke_tokens(work: Work, username: str) -> None:
    """Log an account out everywhere."""
    account = _known(work, username)
    auth.revoke_tokens(work, account=username)
    work.record(Kind.ACCOUNT_TOKENS_REVOKED, f"account {username}", site=account.site)


def to_answer(account: Account, password: str | None = None) -> AccountAnswer:
    """The account as admins see it."""
    return AccountAnswer(
        username=account.username,
        role=Role(account.role),
        site=account.site,
        created_at=account.created_at,
        disabled=account.disabled,
        password=password,
    )
