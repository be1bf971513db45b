"""Which versions understand each other.

Every exchange carries the protocol number of its sender. A hospital is upgraded when the hospital likes, so a server
accepts a range; what does not fit is refused with a sentence that says which side to upgrade.
"""

from medhive import __version__
from medhive.errors import IncompatibleVersion

PROTOCOL = 2
"""The number this side speaks.

A signature covers every field of what is signed, also one that is left at its default: a side that does not know a field can
neither read nor verify it. So the number goes up with each change of what is signed (`tests/core/test_core_version.py`).
2: tasks name SCAFFOLD's correction, contributions the sum of their learning rates.
"""
OLDEST_PROTOCOL = 2
"""The oldest that this side still understands."""
PROTOCOL_HEADER = "MedHive-Protocol"
SOFTWARE_HEADER = "MedHive-Version"
MAX_DIGITS, MAX_SOFTWARE = 9, 50  # characters of what the two headers say that are looked at
HOLD_HEADER = "MedHive-Hold"  # for how many seconds a look that finds nothing may be kept open
PROBLEM_HEADER = "MedHive-Problem"  # a refusal's code, also where there is no body to say it in


def is_number(text: str) -> bool:
    """Whether a header's text is a protocol's number."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def understood(protocol: int) -> bool:
    """Whether this side understands a peer that speaks this protocol."""
    return OLDEST_PROTOCOL <= protocol <= PROTOCOL


def require_compatible(theirs: int, us: str, them: str, software: str = "") -> None:
    """Refuse a peer whose protocol this side does not understand.

    Args:
        theirs: the protocol number that the peer sent.
        us: this side's name for people, such as "the coordinator".
        them: the other side's.
        software: the other side's version of MedHive, where it is known.

    Raises:
        IncompatibleVersion: the text says which side to upgrade.
    """
    if understood(theirs):
        return
    old, new = (us, them) if theirs > PROTOCOL else (them, us)
    named = f"{them} (MedHive {software})" if software else them
    range_ = f"{OLDEST_PROTOCOL} to {PROTOCOL}" if OLDEST_PROTOCOL < PROTOCOL else str(PROTOCOL)
    raise IncompatibleVersion(
        f"{named} speaks protocol {theirs}, {us} (MedHive {__version__}) {range_}: upgrade {old}, {new} is newer.",
        theirs=theirs,
        oldest=OLDEST_PROTOCOL,
        newest=PROTOCOL,
    )
