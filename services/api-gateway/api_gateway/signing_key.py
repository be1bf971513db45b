"""The coordinator's signing key on disk, and how another one takes its place: named by the former one, and signed by it.

`secrets/coordinator.key` signs; `secrets/successions.json` holds every key that came before, each naming the next. A roll is
three files, in an order that lets a process that was killed anywhere be followed by one that finishes or forgets it: the
new key under another name, the succession, and the new key under its own name. What is not yet in the successions nobody
knows.

A roll happens inside a writing unit of work, and every unit looks here for the key when it has begun (`present`): of several
gateways none commits anything under a key that has a successor already, nor refuses what names one that it has not read yet.
"""

import contextlib
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from medhive.errors import Conflict, InvalidInput
from medhive.leftovers import sync_folder
from medhive.signing import SigningKey, sign, write_secret
from medhive.wire import MAX_SUCCESSIONS, Succession, SuccessionBody

KEY: Final = "coordinator.key"
NEXT_KEY: Final = "coordinator-next.key"
SUCCESSIONS: Final = "successions.json"

_SUCCESSIONS = TypeAdapter(tuple[Succession, ...])


def open_key(folder: Path) -> tuple[SigningKey, tuple[Succession, ...]]:
    """The key that signs, made at the first start, and the successions that led to it, oldest first.

    Raises:
        InvalidInput: a file cannot be read.
    """
    path, following = folder / KEY, folder / NEXT_KEY
    if not path.exists():
        SigningKey.generate().save(path)
    successions = _parsed(folder, reading(folder))
    if following.exists():
        if successions and successions[-1].body.new_public_key == SigningKey.load(following).public.text:
            following.replace(path)
            sync_folder(folder)
        else:
            following.unlink()
    return SigningKey.load(path), successions


def present(folder: Path, read: bytes) -> tuple[SigningKey, tuple[Succession, ...], bytes] | None:
    """What `open_key` would return, and what tells it from a later one; None while that is `read` still.

    Changes no file and needs no lock: it follows a roll that is only half on disk.

    Raises:
        InvalidInput: a file cannot be read.
    """
    found = reading(folder)
    if found == read:
        return None
    successions = _parsed(folder, found)
    with contextlib.suppress(InvalidInput):  # mostly it has its own name by now
        key = SigningKey.load(folder / NEXT_KEY)
        if successions and successions[-1].body.new_public_key == key.public.text:
            return key, successions, found
    return SigningKey.load(folder / KEY), successions, found


def reading(folder: Path) -> bytes:
    """What tells whether the key has changed; nothing before the first roll.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        return (folder / SUCCESSIONS).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(folder) from error


def roll(folder: Path, now: datetime) -> SigningKey:
    """Make another key, have the present one name it, and let it sign from now on.

    Call it under the state folder's lock and inside a writing unit of work.

    Raises:
        Conflict: a hospital could not follow one more.
    """
    former, successions = open_key(folder)
    if len(successions) >= MAX_SUCCESSIONS:
        raise Conflict(
            f"The coordinator's key was changed {MAX_SUCCESSIONS} times, which is all that hospitals follow."
        )
    following = SigningKey.generate()
    following.save(folder / NEXT_KEY)
    body = SuccessionBody(old_public_key=former.public.text, new_public_key=following.public.text, issued_at=now)
    _write(folder / SUCCESSIONS, (*successions, sign(body, former)))
    return open_key(folder)[0]


def _parsed(folder: Path, content: bytes) -> tuple[Succession, ...]:
    try:
        return _SUCCESSIONS.validate_json(content) if content else ()
    except ValidationError as error:
        raise _unreadable(folder) from error


def _unreadable(folder: Path) -> InvalidInput:
    return InvalidInput(
        f"Cannot read the successions of the coordinator's key in {folder / SUCCESSIONS}; restore a backup."
    )


def _write(path: Path, successions: tuple[Succession, ...]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    write_secret(part, _SUCCESSIONS.dump_json(successions))
    part.replace(path)
    sync_folder(path.parent)
