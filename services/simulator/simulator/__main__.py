"""`medhive-simulate`: one command; what it needs is imported when it runs."""

import sys

from medhive.terminal import main as run_program
from simulator.command import simulate_command as program


def main() -> None:
    """Run the command line."""
    sys.exit(run_program(program))


if __name__ == "__main__":
    main()
