"""Which versions understand each other.

Every exchange carries the protocol number of its sender. A hospital is upgraded when the hospital likes, so a server
accepts a range; what does not fit is refused with a sentence that says which side to upgrade.
"""

from medhive import __version__
from medhive.errors import IncompatibleVersion

PROTOCOL = 1  # the number this side speaks
OLDEST_PROTOCOL = 1  # the oldest that this side still understands
PROTOCOL_HEADER = "MedHive-Protocol"
SOFTWARE_HEADER = "MedHive-Version"
PROBLEM_HEADER = "MedHive-Problem"  # a refusal's code, also where there is no body to say it in


def require_compatible(theirs: int, us: str, them: str) -> None:
    """Refuse a peer whose protocol this side does not understand.

    Args:
        theirs: the protocol number that the peer sent.
        us: this side's name for people, such as "the coordinator".
        them: the other side's.

    Raises:
        IncompatibleVersion: the text says which side to upgrade.
    """
    if theirs > PROTOCOL:
        old, new, number = us, them, theirs
    elif theirs < OLDEST_PROTOCOL:
        old, new, number = them, us, theirs
    else:
        return
    raise IncompatibleVersion(
        f"{them} speaks protocol {number}, {us} {OLDEST_PROTOCOL} to {PROTOCOL} (MedHive {__version__}): upgrade {old}, "
        f"{new} is newer.",
        theirs=theirs,
        oldest=OLDEST_PROTOCOL,
        newest=PROTOCOL,
    )
