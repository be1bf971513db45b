"""The table of `medhive-admin`'s commands; what they do is imported when they are called."""

import sys
from typing import Final

from medhive.terminal import Program
from medhive.terminal import main as run_program

_HERE: Final = "api_gateway.admin"
COMMANDS: Final = {
    "login": (f"{_HERE}.identity:login", "Log in to a coordinator and remember it."),
    "accounts": (f"{_HERE}.identity:accounts", "People's accounts: list, add, remove, password, revoke-tokens."),
    "invite": (f"{_HERE}.sites:invite", "Make a one-time invite for a hospital; list or delete invites."),
    "sites": (f"{_HERE}.sites:sites", "List the hospitals, or show one."),
    "tunnel": (f"{_HERE}.sites:tunnel", "Show the tunnel's public address, for SERVER_ADDRESS at hospitals."),
    "revoke": (f"{_HERE}.sites:revoke", "Shut a hospital out, at once and for good."),
    "studies": (f"{_HERE}.studies:studies", "Studies: list, show, create, members, queue."),
    "request": (f"{_HERE}.runs:request", "Ask for a training run of a study."),
    "requests": (f"{_HERE}.runs:requests", "List training requests."),
    "approve": (f"{_HERE}.runs:approve", "Approve a request: its run asks the hospitals for consent."),
    "reject": (f"{_HERE}.runs:reject", "Reject a request, with a reason."),
    "runs": (f"{_HERE}.runs:runs", "List the active runs, or all."),
    "show": (f"{_HERE}.runs:show", "Show a request (REQ_n), a run (RUN_n) or a version (STUDY/n)."),
    "watch": (f"{_HERE}.runs:watch", "Follow a run live, to its end."),
    "stop": (f"{_HERE}.runs:stop", "Stop a run."),
    "history": (f"{_HERE}.runs:history", "List the runs that have ended."),
    "models": (f"{_HERE}.models:models", "List model versions."),
    "model": (f"{_HERE}.models:model", "Show one version: metrics, confusion matrix, decisions."),
    "compare": (f"{_HERE}.models:compare", "Compare two versions."),
    "export": (f"{_HERE}.models:export", "Write a version to a file, or offer it to one hospital."),
    "rollback": (f"{_HERE}.models:rollback", "Offer an older version to all hospitals as the candidate again."),
    "cleanup": (f"{_HERE}.models:cleanup", "Retire old versions and delete what nothing refers to."),
    "stats": (f"{_HERE}.models:stats", "Runs, success rate, mean accuracy, sites, images, bytes."),
    "queue": (f"{_HERE}.queues:queue", "A contribution queue: status, execute, clear, help, quit; alone, a prompt."),
    "audit": (f"{_HERE}.audit:audit", "The event log: verify it, export it."),
    "menu": (f"{_HERE}.menu:menu", "A numbered menu over these commands."),
}
program = Program(
    "medhive-admin",
    "The coordinator's command line: hospitals, studies, requests, runs and model versions.",
    COMMANDS,
    hints={"not-authenticated": "Log in with: medhive-admin login"},
)


def main() -> None:
    """Run the command line."""
    sys.exit(run_program(program))


if __name__ == "__main__":
    main()
