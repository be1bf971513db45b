"""The table of `medhive-site`'s commands; what they do, and its heavy libraries, are imported when they are called."""

import sys
from typing import Final

from medhive.terminal import Program
from medhive.terminal import main as run_program

_HERE: Final = "fl_client.cli"
COMMANDS: Final = {
    "join": (f"{_HERE}.membership:join", "Join a coordinator with its invite (JOIN_TOKEN)."),
    "run": (f"{_HERE}.run:run", "Stay connected and train when a run that this hospital agreed to asks for it."),
    "status": (f"{_HERE}.membership:status", "Who this hospital is, what waits, what goes on."),
    "check-data": (f"{_HERE}.data:check_data", "Read the data as training would, and say what is wrong with them."),
    "pull": (f"{_HERE}.pull:pull", "Fetch scans from the hospital's PACS over DICOMweb."),
    "split": (f"{_HERE}.data:split", "Split one dataset into several sites' (for trials)."),
    "request": (f"{_HERE}.runs:request", "Ask the coordinator for a training run."),
    "requests": (f"{_HERE}.runs:requests", "List training requests and the runs they became."),
    "consent": (f"{_HERE}.runs:consent", "Agree to a run or a queue, after a look at it and at the own data."),
    "decline": (f"{_HERE}.runs:decline", "Decline a run, with a reason."),
    "withdraw": (f"{_HERE}.runs:withdraw", "Withdraw a consent; training stops at once."),
    "train": (f"{_HERE}.queues:train", "Train for a study's queue, now; the update waits for upload."),
    "upload": (f"{_HERE}.queues:upload", "Send the update that train has made."),
    "download": (f"{_HERE}.queues:download", "Fetch a study's newest global model."),
    "cancel": (f"{_HERE}.runs:cancel", "Cancel an own request that is not decided yet."),
    "policy": (f"{_HERE}.policy:policy", "The signed policy that may agree by itself: show, sign, remove."),
    "history": (f"{_HERE}.versions:history", "Which model versions came, what was decided, which was in use when."),
    "updates": (f"{_HERE}.versions:updates", "List the model versions that were offered."),
    "accept": (f"{_HERE}.versions:accept", "Accept a version: it is the one in use from now on."),
    "reject": (f"{_HERE}.versions:reject", "Reject a version, with a reason."),
    "rollback": (f"{_HERE}.versions:rollback", "Go back to an earlier accepted version."),
    "models": (f"{_HERE}.versions:models", "List the model files in this hospital."),
    "predict": (f"{_HERE}.versions:predict", "Class probabilities for a file or a folder, by the version in use."),
    "settings": (f"{_HERE}.membership:settings", "Show or change limits, pause, data folders and class names."),
    "menu": (f"{_HERE}.menu:menu", "A numbered menu over these commands."),
}
program = Program(
    "medhive-site",
    "A hospital's command line: data, consents, training and the model versions in use here.",
    COMMANDS,
    hints={"not-joined": ""},
)


def main() -> None:
    """Run the command line."""
    sys.exit(run_program(program))


if __name__ == "__main__":
    main()
