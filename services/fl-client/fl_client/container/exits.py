"""The container's exit codes, so that whoever looks after many hospitals need not read logs to know who must act.

0 to 2 are `medhive-site`'s own. Docker uses 125 to 127 itself, and 128 and above mean a signal.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from medhive.errors import MedHiveError


class Exit(IntEnum):
    """Why the container ended; docs/hospital-container.md says what to do about each."""

    STOPPED = 0
    FAILED = 1
    WRONG_USE = 2
    SETTING = 10
    INVITE = 11
    AUTHORITY = 12
    DATA = 13
    STATE = 14
    DISK_FULL = 15
    NOT_WANTED = 16
    VERSIONS = 17
    TERMINATED = 143


BY_CAUSE: Final[Mapping[str, Exit]] = {
    "wrong-use": Exit.WRONG_USE,
    "wrong-setting": Exit.SETTING,
    "invite-refused": Exit.INVITE,
    "wrong-authority": Exit.AUTHORITY,
    "data-unusable": Exit.DATA,
    "state-unusable": Exit.STATE,
    "already-running": Exit.STATE,
    "no-space": Exit.DISK_FULL,
    "site-revoked": Exit.NOT_WANTED,
    "already-joined": Exit.NOT_WANTED,
    "incompatible-version": Exit.VERSIONS,
    "clock-skew": Exit.VERSIONS,
}
"""An error's code → the exit code; every other error is 1."""


def exit_code(error: MedHiveError) -> Exit:
    """The exit code for an error that ends the container."""
    return BY_CAUSE.get(error.code, Exit.FAILED)
