"""What a running node says to people: every event has its words, and the ones that ask for something name the command."""

import json
from pathlib import Path

import pytest

from fl_client import events
from fl_client.cli.report import Reporter, lines_of
from medhive.terminal import Terminal

FILE = Path("/state/models/brain-mri/north_FinalGlobal_v3.safetensors")
# Known from the epochs that follow; a line of its own would only push them away.
SILENT = {events.RoundStarted}

EXAMPLES: dict[type[events.NodeEvent], tuple[events.NodeEvent, str]] = {
    events.Serving: (
        events.Serving(
            "north", "Coordinator", ("https://x:1",), "x:2", Path("/s"), {"a": Path("/d")}, {"a": 1}, {"a": 2}
        ),
        "study a: data in /d, newest version 2, in use 1",
    ),
    events.Connected: (events.Connected("fleet", 12.0), "connected to the fleet again after 12 s"),
    events.Disconnected: (events.Disconnected("gateway", "no route"), "trying again: no route"),
    events.ConsentWanted: (events.ConsentWanted("RUN_1", "a", 3, "admin"), "agree with:   medhive-site consent RUN_1"),
    events.QueueConsentWanted: (
        events.QueueConsentWanted("QUEUE_1", "a", 10, "the policy is not valid now"),
        "averaged at 10 contributions, waits for an answer\n  nothing agrees by itself: the policy is not valid now\n"
        "  agree with:   medhive-site consent QUEUE_1",
    ),
    events.ConsentGiven: (events.ConsentGiven("RUN_1", "a", "policy", "Dr. N"), "by itself (policy, Dr. N)"),
    events.ConsentFailed: (events.ConsentFailed("RUN_1", "empty class"), "could not agree to RUN_1: empty class"),
    events.RunStarted: (
        events.RunStarted(
            "RUN_1", "a", 3, {"cat": 10, "dog": 20}, {"train": {"cat": 7, "dog": 15}, "heldout": {"cat": 3}}
        ),
        "  cat      10  (train 7, heldout 3)",
    ),
    events.RoundStarted: (events.RoundStarted("RUN_1", 1, 3, "train"), ""),
    events.EpochDone: (
        events.EpochDone("RUN_1", 1, 3, 2, 5, 0.5, 0.75, 3.21),
        "RUN_1 round 1/3, epoch 2/5: loss 0.5000, accuracy 0.7500, 3.2 s",
    ),
    events.RoundDone: (
        events.RoundDone("RUN_1", 1, 3, "train", {"train_loss": 0.4, "train_accuracy": 0.8, "val_loss": 9.0}, 1.5),
        "RUN_1 round 1/3 done: loss 0.4000, accuracy 0.8000, 1.50 min",
    ),
    events.RoundFailed: (events.RoundFailed("RUN_1", 2, "out-of-memory", "too big"), "failed (out-of-memory): too big"),
    events.TaskRefused: (events.TaskRefused("RUN_1", 2, "expired", "too late"), "refused (expired): too late"),
    events.RunFinished: (
        events.RunFinished("RUN_1", "brain-mri", "completed", 3, "", 0.9, 0.1, 3, FILE),
        "  accept with: medhive-site accept 3 --study brain-mri",
    ),
    events.VersionArrived: (events.VersionArrived("brain-mri", 3, FILE, True), f"  file: {FILE}"),
    events.VersionJudged: (events.VersionJudged("a", 3, {"candidate": 0.9, "champion": 0.8}), "champion 0.8000"),
    events.LogRewritten: (events.LogRewritten("row 3 differs"), "WARNING: row 3 differs"),
    events.Problem: (events.Problem("fleet", "full"), "fleet: full"),
    events.PauseChanged: (events.PauseChanged(True), "training is held"),
    events.Revoked: (events.Revoked("ask them"), "stopped for good: ask them"),
    events.Stopped: (events.Stopped(), "stopped"),
}


@pytest.mark.parametrize("kind", events.NodeEvent.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_event_has_its_words(kind: type[events.NodeEvent]) -> None:
    event, words = EXAMPLES[kind]
    text = "\n".join(lines_of(event))
    assert words in text
    assert bool(text) != (kind in SILENT)


def test_the_end_of_a_run_names_rounds_figures_file_and_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(Terminal())(EXAMPLES[events.RunFinished][0])
    assert capsys.readouterr().out.splitlines() == [
        "RUN_1 of brain-mri is completed after 3 rounds",
        "  final accuracy 0.9000, loss 0.1000",
        f"  file: {FILE}",
        "  accept with: medhive-site accept 3 --study brain-mri",
        "  reject with: medhive-site reject 3 --study brain-mri --reason '...'",
    ]


def test_for_a_program_each_event_is_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(Terminal(json=True))
    for event, _ in EXAMPLES.values():
        reporter(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [kind.__name__ for kind in EXAMPLES]
