"""What a running node says to the people who look at its terminal, one event in one or a few lines.

With `--json` each event is a JSON line. Both stay on this machine; they may name its files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fl_client import events
from fl_client.tasks.base import PARTS
from medhive import __version__
from medhive.terminal import Terminal, share


class Reporter:
    """Prints a node's events; is called on the node's threads, one line at a time."""

    def __init__(self, terminal: Terminal) -> None:
        """Print through this terminal."""
        self._terminal = terminal

    def __call__(self, event: events.NodeEvent) -> None:
        """Print one event."""
        text = "\n".join(lines_of(event))
        if text or self._terminal.json:
            self._terminal.record({"event": type(event).__name__, **_plain(asdict(event))}, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def lines_of(event: events.NodeEvent) -> Iterator[str]:
    """An event in words; nothing for one that people need not hear of."""
    write = _WRITERS.get(type(event))
    if write is not None:
        yield from write(event)


def _serving(event: events.Serving) -> Iterator[str]:
    yield f"MedHive {__version__}: {event.site} of {event.coordinator}"
    yield f"coordinator {', '.join(event.addresses)}, fleet {event.fleet_address}"
    yield f"state in {event.state_dir}"
    for study, folder in event.studies.items():
        newest, champion = event.newest.get(study), event.champions.get(study)
        versions = f"newest version {newest}" if newest is not None else "no version yet"
        used = f", in use {champion}" if champion is not None else ""
        yield f"study {study}: data in {folder}, {versions}{used}"


def _connected(event: events.Connected) -> Iterator[str]:
    yield f"connected to the {event.to}" + (f" again after {event.away_s:.0f} s" if event.away_s else "")


def _disconnected(event: events.Disconnected) -> Iterator[str]:
    yield f"the {event.to} does not answer, trying again: {event.reason}"


def _consent_wanted(event: events.ConsentWanted) -> Iterator[str]:
    yield f"{event.run_id} of {event.study}, {event.rounds} rounds, asked for by {event.requested_by}, waits for an answer"
    yield from _how_to_answer(event.run_id, event.note)


def _queue_consent_wanted(event: events.QueueConsentWanted) -> Iterator[str]:
    yield f"{event.queue_id} of {event.study}, averaged at {event.capacity} contributions, waits for an answer"
    yield from _how_to_answer(event.queue_id, event.note)


def _how_to_answer(number: str, note: str) -> Iterator[str]:
    if note:
        yield f"  nothing agrees by itself: {note}"
    yield f"  agree with:   medhive-site consent {number}"
    yield f"  decline with: medhive-site decline {number}"


def _consent_given(event: events.ConsentGiven) -> Iterator[str]:
    yield f"agreed to {event.run_id} of {event.study} by itself ({event.given_by}, {event.person})"


def _consent_failed(event: events.ConsentFailed) -> Iterator[str]:
    yield f"could not agree to {event.run_id}: {event.reason}"


def _run_started(event: events.RunStarted) -> Iterator[str]:
    yield f"{event.run_id} of {event.study} begins: {event.rounds} rounds"
    width = max((len(name) for name in event.classes), default=0)
    for name, count in event.classes.items():
        parts = ", ".join(f"{part} {event.parts[part].get(name, 0)}" for part in PARTS if part in event.parts)
        yield f"  {name:<{width}}  {count:>6}  ({parts})"
    yield f"  {'all':<{width}}  {sum(event.classes.values()):>6}"


def _epoch_done(event: events.EpochDone) -> Iterator[str]:
    yield (
        f"{event.run_id} round {event.round}/{event.rounds}, epoch {event.epoch}/{event.epochs}: "
        f"loss {event.loss:.4f}, accuracy {event.accuracy:.4f}, {event.seconds:.1f} s"
    )


def _round_done(event: events.RoundDone) -> Iterator[str]:
    done = "done" if event.kind == "train" else f"{event.kind} done"
    figures = [f"loss {event.loss:.4f}" if event.loss is not None else ""]
    figures.append(f"accuracy {event.accuracy:.4f}" if event.accuracy is not None else "")
    figures.append(f"{event.minutes:.2f} min")
    yield f"{event.run_id} round {event.round}/{event.rounds} {done}: {', '.join(word for word in figures if word)}"


def _round_failed(event: events.RoundFailed) -> Iterator[str]:
    yield f"{event.run_id} round {event.round} failed ({event.code}): {event.message}"


def _task_refused(event: events.TaskRefused) -> Iterator[str]:
    yield f"{event.run_id} round {event.round} refused ({event.code}): {event.message}"


def _run_finished(event: events.RunFinished) -> Iterator[str]:
    yield f"{event.run_id} of {event.study} is {event.state} after {event.rounds} rounds" + (
        f": {event.reason}" if event.reason else ""
    )
    if event.accuracy is not None or event.loss is not None:
        yield f"  final accuracy {share(event.accuracy)}, loss {share(event.loss)}"
    if event.version is not None:
        yield from _decide(event.study, event.version, event.file)


def _decide(study: str, version: int, file: Path | None) -> Iterator[str]:
    if file is not None:
        yield f"  file: {file}"
    yield f"  accept with: medhive-site accept {version} --study {study}"
    yield f"  reject with: medhive-site reject {version} --study {study} --reason '...'"


def _version_arrived(event: events.VersionArrived) -> Iterator[str]:
    yield f"version {event.version} of {event.study} has arrived" + (", a candidate" if event.candidate else "")
    if event.candidate:
        yield from _decide(event.study, event.version, event.file)


def _version_judged(event: events.VersionJudged) -> Iterator[str]:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in event.accuracies.items())
    yield f"version {event.version} of {event.study} on the own held-out data, accuracy: {figures}"


def _log_rewritten(event: events.LogRewritten) -> Iterator[str]:
    yield f"WARNING: {event.message}"


def _problem(event: events.Problem) -> Iterator[str]:
    yield f"{event.what}: {event.message}"


def _pause_changed(event: events.PauseChanged) -> Iterator[str]:
    yield "training is held by this hospital's settings" if event.paused else "training goes on"


def _revoked(event: events.Revoked) -> Iterator[str]:
    yield f"stopped for good: {event.message}"


def _stopped(_event: events.Stopped) -> Iterator[str]:
    yield "stopped"


_WRITERS: Final[Mapping[type[events.NodeEvent], Callable[[Any], Iterator[str]]]] = {
    events.Serving: _serving,
    events.Connected: _connected,
    events.Disconnected: _disconnected,
    events.ConsentWanted: _consent_wanted,
    events.QueueConsentWanted: _queue_consent_wanted,
    events.ConsentGiven: _consent_given,
    events.ConsentFailed: _consent_failed,
    events.RunStarted: _run_started,
    events.EpochDone: _epoch_done,
    events.RoundDone: _round_done,
    events.RoundFailed: _round_failed,
    events.TaskRefused: _task_refused,
    events.RunFinished: _run_finished,
    events.VersionArrived: _version_arrived,
    events.VersionJudged: _version_judged,
    events.LogRewritten: _log_rewritten,
    events.Problem: _problem,
    events.PauseChanged: _pause_changed,
    events.Revoked: _revoked,
    events.Stopped: _stopped,
}
