"""Passwords, tokens, and how often somebody may try.

Passwords are hashed with Argon2id (RFC 9106) outside any transaction, for it is slow on purpose. Tokens are random, so their
plain SHA-256 is kept. Failures are counted in the database, so that several gateways count together.
"""

import math
import secrets
import threading
from datetime import datetime, timedelta

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from api_gateway.db import Database
from api_gateway.models import Attempt, Token
from api_gateway.state import TOKEN_BYTES
from api_gateway.work import Work, token_hash
from medhive.errors import TooManyAttempts
from medhive.states import Role
from medhive.wire import TokenAnswer

PERSON_TOKEN_LIFE = timedelta(hours=12)  # a working day
SITE_TOKEN_LIFE = timedelta(hours=24)  # its machine renews it by a signature
PASSWORD_BYTES = 18  # of a generated password: 24 characters
HASHES_AT_ONCE = 2  # each takes 64 MiB for a moment: logins may not take all memory

WINDOW = timedelta(minutes=5)
FAILURES_PER_NAME = 5  # of one name from one address in a window
FAILURES_PER_SOURCE = 30  # of one address in a window
REPORTED_PER_SOURCE = 5  # failures in a window that become events; more would let a stranger fill the log

_HASHER = PasswordHasher()
_HASHING = threading.BoundedSemaphore(HASHES_AT_ONCE)
# Verified when there is no such account, so that the time taken does not tell.
_NOBODYS = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$2uXiZGFLcHq0rAuvv9IP9tGZhKbQjBnoyUqXzFjWJzM"


def hash_password(password: str) -> str:
    """The Argon2id hash of a password."""
    with _HASHING:
        return _HASHER.hash(password)


def password_fits(hashed: str | None, password: str) -> bool:
    """Whether the password is the one; takes as long when there is no account."""
    with _HASHING:
        try:
            return _HASHER.verify(hashed or _NOBODYS, password) and hashed is not None
        except (VerificationError, InvalidHashError):
            return False


def new_password() -> str:
    """A random password for a person to keep."""
    return secrets.token_urlsafe(PASSWORD_BYTES)


def issue(
    work: Work, role: Role, name: str, life: timedelta, *, account: str | None = None, site: str | None = None
) -> TokenAnswer:
    """Make a token; it is shown in this answer and never again."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    row = Token(
        sha256=token_hash(token),
        role=role,
        name=name,
        account=account,
        site=site,
        created_at=work.now,
        expires_at=work.now + life,
    )
    work.session.add(row)
    work.session.flush()
    return TokenAnswer(token=token, role=role, name=name, expires_at=row.expires_at)


def revoke_tokens(work: Work, *, account: str | None = None, site: str | None = None) -> None:
    """Revoke all tokens of an account or of a site, its people's included."""
    owner = Token.account == account if account else Token.site == site
    statement = update(Token).where(owner, Token.revoked_at.is_(None)).values(revoked_at=work.now)
    work.session.execute(statement.execution_options(synchronize_session="fetch"))


def attempt_keys(username: str, source: str) -> tuple[tuple[str, int], ...]:
    """What a failed login counts against, and how much is allowed."""
    return ((f"login:{username}@{source}", FAILURES_PER_NAME), (f"login@{source}", FAILURES_PER_SOURCE))


def require_not_throttled(session: Session, now: datetime, keys: tuple[tuple[str, int], ...]) -> None:
    """Refuse who has failed too often.

    Raises:
        TooManyAttempts: `data.retry_after_s` says for how long.
    """
    for key, allowed in keys:
        row = session.get(Attempt, key)
        if row is not None and row.window_ends_at > now and row.count >= allowed:
            wait = (row.window_ends_at - now).total_seconds()
            raise TooManyAttempts(
                f"Too many failed attempts; try again in {math.ceil(wait / 60)} min.", retry_after_s=math.ceil(wait)
            )


def count_failure(database: Database, now: datetime, keys: tuple[tuple[str, int], ...]) -> int:
    """Count a failure against each key; returns the count of the last one, the address's."""
    with database.write() as session:
        session.execute(delete(Attempt).where(Attempt.window_ends_at <= now))
        return [_count(session, now, key) for key, _ in keys][-1]


def _count(session: Session, now: datetime, key: str) -> int:
    row = session.get(Attempt, key)
    if row is None:
        session.add(Attempt(key=key, count=1, window_ends_at=now + WINDOW))
        return 1
    row.count += 1
    return row.count
