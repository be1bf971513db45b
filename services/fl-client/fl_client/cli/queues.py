"""`train`, `upload` and `download`: a contribution queue's steps at the hospital, and a person's word on a queue."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click

from fl_client.cli.installation import open_site
from fl_client.consents import DataCheck
from fl_client.jobs import Epoch, JobEvent
from fl_client.queues import QueueClient, Trained, grant_queue, open_queues
from fl_client.site import Site
from medhive.consent import Consent
from medhive.queues import QueueAnswer, QueueContributionAnswer, QueueStatus
from medhive.states import ConsentState
from medhive.terminal import Command, Terminal, duration, moment, pass_terminal, share, size


@contextmanager
def _queue(study: str | None) -> Iterator[QueueClient]:
    with open_site() as site, site.trainer() as trainer:
        yield QueueClient(site, trainer, study)


@click.command(cls=Command)
@click.argument("study", required=False)
@click.option("--upload", "send", is_flag=True, help="Send the update too, when it is made.")
@pass_terminal
def train(terminal: Terminal, study: str | None, send: bool) -> None:
    """Train for STUDY's queue now, from the newest model on this hospital's own data; the update waits here for `upload`."""
    with _queue(study) as queue:
        trained = queue.train_federated(_epochs(terminal))
        if not send:
            terminal.result(trained.contribution, lambda: _show_trained(terminal, trained))
            return
        terminal.note("The update is made.")
        sent = _send(terminal, queue)
    terminal.result(sent, lambda: _show_sent(terminal, sent))


def _epochs(terminal: Terminal) -> Any:
    def listen(event: JobEvent) -> None:
        if isinstance(event, Epoch):
            terminal.note(f"epoch {event.epoch}/{event.epochs}, loss {event.loss:.4f}, accuracy {event.accuracy:.4f}")

    return listen


def _show_trained(terminal: Terminal, trained: Trained) -> None:
    body = trained.body
    terminal.fields(
        [
            ("study", body.study),
            ("queue", body.queue_id),
            ("trained from", f"version {body.base_version}"),
            ("examples", body.examples),
            ("took", duration(body.training_s)),
            *((name, share(value)) for name, value in sorted(body.metrics.items())),
            ("size", size(body.content_size_bytes)),
        ]
    )
    terminal.line(f"It waits here; send it with: medhive-site upload {body.study}")


@click.command(cls=Command)
@click.argument("study", required=False)
@pass_terminal
def upload(terminal: Terminal, study: str | None) -> None:
    """Send the update that `train` has made for STUDY's queue; goes on where an earlier try stopped."""
    with _queue(study) as queue:
        sent = _send(terminal, queue)
    terminal.result(sent, lambda: _show_sent(terminal, sent))


def _send(terminal: Terminal, queue: QueueClient) -> QueueContributionAnswer:
    with terminal.progress(f"update for {queue.study}", bytes_=True) as advance:
        return queue.send_update_to_server(advance)


def _show_sent(terminal: Terminal, sent: QueueContributionAnswer) -> None:
    reason = f" ({sent.reason})" if sent.reason else ""
    terminal.line(f"Contribution {sent.number} to {sent.queue_id} of {sent.study}: {sent.state}{reason}.")


@click.command(cls=Command)
@click.argument("study", required=False)
@pass_terminal
def download(terminal: Terminal, study: str | None) -> None:
    """Fetch STUDY's newest global model, checked against the coordinator's signature."""
    with _queue(study) as queue, terminal.progress(f"newest model of {queue.study}", bytes_=True) as advance:
        known = queue.download_global_model(advance)
    value = {"study": known.study, "version": known.version, "digest": known.digest, "file": str(known.file)}
    terminal.result(value, lambda: terminal.line(f"Version {known.version} of {known.study}: {known.file}"))


# ---- for the other commands ----------------------------------------------------------------------------------------


def agree(
    terminal: Terminal,
    site: Site,
    queue: QueueAnswer,
    *,
    person: str,
    check: DataCheck,
    days: float,
    contributions: int,
) -> Consent:
    """Sign a consent to a queue and say so."""
    signed = grant_queue(
        site, queue, person=person, check=check, valid_for=timedelta(days=days), contributions=contributions
    )
    until = moment(signed.body.expires_at)
    value = {"queue": queue.id, "consent": "granted", "until": until, "contributions": contributions}
    text = f"Agreed to {queue.id} until {until}, for {contributions} contributions."
    terminal.result(value, lambda: terminal.line(text))
    return signed


def queue_details(terminal: Terminal, queue: QueueAnswer) -> None:
    """What a hospital agrees to."""
    options = queue.spec.options
    terminal.fields(
        [
            ("queue", queue.id),
            ("study", queue.study),
            ("task", queue.spec.task),
            ("classes", ", ".join(queue.spec.data.classes)),
            ("averages at", f"{options.capacity} contributions of {options.min_sites} hospitals"),
            ("oldest base", f"{options.max_staleness} versions before the newest"),
            ("local epochs", options.local_epochs),
            ("batch size", options.batch_size),
            ("learning rate", options.lr or "the task's own"),
            ("newest version", queue.newest_version),
            ("specification", queue.spec_hash),
        ]
    )


def queue_lines(site: Site) -> list[dict[str, Any]]:
    """For `status`: each open queue with its fill, this hospital's consent and what it has sent."""
    lines = []
    for queue in open_queues(site):
        status, own = site.gateway.queue_status(queue.study), site.gateway.contributions(queue.study)
        consent = next((str(item.state) for item in queue.consents if item.site == site.name), "pending")
        waits = site.store.fact(f"queue-update/{queue.study}") is not None
        lines.append({**status.model_dump(mode="json"), "consent": consent, "to_send": waits, "sent": len(own)})
    return lines


def queue_line(line: dict[str, Any]) -> str:
    """One of them in words."""
    status = QueueStatus.model_validate(line)
    newest = "no model yet" if status.newest_version is None else f"newest version {status.newest_version}"
    text = f"{status.queue_id} of {status.study}: {status.queue_size}/{status.capacity} {status.state}, {newest}"
    if line["consent"] != ConsentState.GRANTED:
        return f"{text}; consent {line['consent']}"
    return f"{text}; {line['sent']} sent" + ("; an update waits for `medhive-site upload`" if line["to_send"] else "")
