"""Whether the hospital's container is well: its loop leaves a mark, and Docker's check, which must be cheap, reads it.

A hospital that waits for its coordinator is well: restarting it would help nobody. It is not well when the loop itself no
longer turns. Docker runs this file by its path, without the package and without `site`, so only the standard library's
smallest parts are imported.
"""

import os
import sys
import time

PLACES = ("/tmp", "/dev/shm")  # noqa: S108 - a mark of two words, gone with the container, where a read-only root allows one
NAME = "medhive-health"
LONGEST_TURN_S = 900.0
"""A turn of the loop may fetch a model over a slow line; one that takes longer than this hangs."""

MARK_EVERY_S = 10.0


class Pulse:
    """Writes the mark; what the container is doing, in words, is its content."""

    def __init__(self, places: tuple[str, ...] = PLACES) -> None:
        """Write to the first of these folders that can be written to, or nowhere."""
        self._file = next((os.path.join(place, NAME) for place in places if os.access(place, os.W_OK)), None)  # noqa: PTH118
        self._words = ""
        self._marked = float("-inf")

    def beat(self, words: str) -> None:
        """Leave the mark: at once when the words have changed, else every few seconds."""
        now = time.monotonic()
        if self._file is None or (words == self._words and now - self._marked < MARK_EVERY_S):
            return
        self._words, self._marked = words, now
        try:
            with open(self._file + ".new", "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(words)
            os.replace(self._file + ".new", self._file)  # noqa: PTH105
        except OSError:
            self._file = None  # a full /tmp must not end a hospital's training


def look(places: tuple[str, ...] = PLACES) -> tuple[bool, str]:
    """Whether the container is well, and what it is doing."""
    for place in places:
        try:
            with open(os.path.join(place, NAME), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                age = time.time() - os.fstat(file.fileno()).st_mtime
                words = file.read()
        except OSError:
            continue
        return age < LONGEST_TURN_S, f"{words} ({age:.0f} s ago)"
    return True, "a single command, nothing is served"


def main() -> int:
    """Print what the container is doing; 1 when it hangs. Arguments are other folders than a container's own to look in."""
    well, words = look(tuple(sys.argv[1:]) or PLACES)
    sys.stdout.write(words + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
