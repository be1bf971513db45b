"""How requests, runs and versions look to people, the same at the coordinator and at a hospital.

Every function prints through a `Terminal`; none asks the gateway for anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

from medhive.states import ConsentState, RunState
from medhive.terminal import Terminal, duration, moment, share, size
from medhive.version import PROTOCOL, understood
from medhive.wire import (
    Comparison,
    RequestAnswer,
    RoundAnswer,
    RunAnswer,
    SiteAnswer,
    StudyAnswer,
    VersionAnswer,
)

# A hospital evaluates the weights that it is sent, before it trains them.
BEFORE_A_ROUND: Final = ("val_accuracy", "val_loss", "val_macro_f1", "test_accuracy", "test_loss")


def requests_table(terminal: Terminal, requests: Sequence[RequestAnswer]) -> None:
    """Training requests, one a line."""
    terminal.table(
        ["request", "study", "from", "rounds>", "strategy", "sent", "address", "state", "run", "reason"],
        [
            [
                item.id,
                item.study,
                item.site or item.requested_by,
                item.spec.options.rounds,
                item.spec.options.strategy,
                moment(item.created_at),
                item.source_address,
                item.state,
                item.run_id,
                item.reason,
            ]
            for item in requests
        ],
        empty="no requests",
    )


def request_details(terminal: Terminal, request: RequestAnswer) -> None:
    """Everything about one request."""
    terminal.fields(
        [
            ("request", request.id),
            ("state", request.state),
            ("study", request.study),
            ("from", request.site or request.requested_by),
            ("sent", moment(request.created_at)),
            ("address", request.source_address),
            ("note", request.note),
            ("decided by", request.decided_by),
            ("decided", moment(request.decided_at)),
            ("reason", request.reason),
            ("run", request.run_id),
            *spec_fields(request),
        ]
    )


def spec_fields(item: RequestAnswer | RunAnswer) -> list[tuple[str, object]]:
    """A specification's lines, for the details of a request or a run."""
    options = item.spec.options
    return [
        ("task", item.spec.task),
        ("classes", ", ".join(item.spec.data.classes)),
        ("base version", item.spec.base_version),
        ("rounds", options.rounds),
        ("local epochs", options.local_epochs),
        ("batch size", options.batch_size),
        ("learning rate", "the task's own" if options.lr is None else options.lr),
        ("strategy", f"{options.strategy} (mu {options.mu:g})" if options.strategy == "fedprox" else options.strategy),
        ("fewest sites", options.min_sites),
        ("seed", options.seed),
        ("spec hash", item.spec_hash),
    ]


def runs_table(terminal: Terminal, runs: Sequence[RunAnswer]) -> None:
    """Runs, one a line."""
    terminal.table(
        ["run", "request", "study", "state", "round>", "consents>", "created", "started", "took>", "version", "reason"],
        [
            [
                run.id,
                run.request_id,
                run.study,
                run.state,
                f"{run.round}/{run.rounds}",
                granted(run),
                moment(run.created_at),
                moment(run.started_at),
                took(run.started_at, run.ended_at),
                "" if run.version is None else run.version,
                run.reason,
            ]
            for run in runs
        ],
        empty="no runs",
    )


def granted(run: RunAnswer) -> str:
    """Granted consents of those asked, or nothing where the answer carries none."""
    if not run.consents:
        return ""
    return f"{sum(item.state is ConsentState.GRANTED for item in run.consents)}/{len(run.consents)}"


def took(start: datetime | None, end: datetime | None) -> str:
    """How long something took, or nothing while it goes on."""
    return duration((end - start).total_seconds()) if start and end else ""


def run_details(terminal: Terminal, run: RunAnswer, rounds: Sequence[RoundAnswer] = ()) -> None:
    """Everything about one run: its specification, consents, who trains now, its rounds."""
    terminal.fields(
        [
            ("run", run.id),
            ("request", run.request_id),
            ("state", f"{run.state}, stop requested" if run.stop_requested and not run.ended_at else run.state),
            ("reason", run.reason),
            ("study", run.study),
            ("round", f"{run.round}/{run.rounds}"),
            ("created", moment(run.created_at)),
            ("consents until", moment(run.consent_deadline) if run.state is RunState.CONSENTING else ""),
            ("started", moment(run.started_at)),
            ("ended", moment(run.ended_at)),
            ("version", run.version),
            ("MLflow run", run.mlflow_run_id),
            *spec_fields(run)[:-1],
            ("spec hash", run.spec_hash),
        ]
    )
    if run.consents:
        terminal.line()
        consent_rows = [
            [_with_role(item.site, item.evaluates_only), item.state, moment(item.answered_at)] for item in run.consents
        ]
        terminal.table(["site", "consent", "answered"], consent_rows)
    if run.activity and not run.ended_at:
        terminal.line()
        activity_rows = [
            [
                item.site,
                item.activity,
                item.round,
                f"{item.epoch}/{item.epochs}",
                share(item.loss),
                share(item.accuracy),
            ]
            for item in run.activity
        ]
        terminal.table(["site", "does", "round>", "epoch>", "loss>", "accuracy>"], activity_rows)
    if rounds:
        terminal.line()
        rounds_table(terminal, rounds, run.metrics)
    if run.sites:
        terminal.line()
        named = [*((item.site, item) for item in run.sites)]
        named += [(_with_role(item.site, True), item) for item in run.evaluators]
        site_rows = [
            [name, item.examples, share(item.metrics.get("val_accuracy")), share(item.metrics.get("val_loss"))]
            for name, item in named
        ]
        terminal.table(["final weights at", "examples>", "accuracy>", "loss>"], site_rows)


def _with_role(site: str, evaluates_only: bool) -> str:
    return f"{site} (evaluates only)" if evaluates_only else site


def rounds_table(terminal: Terminal, rounds: Sequence[RoundAnswer], final: Mapping[str, float]) -> None:
    """Rounds, one a line, with how good the model was after each, who answered, and who was dropped and why.

    Args:
        rounds: in their order. The metrics of a round are of the weights that it began with.
        final: metrics of the weights after the last round; empty while the run goes on.
    """
    after = [*(item.metrics for item in rounds[1:]), final]
    tests = ["test_accuracy"] if any("test_accuracy" in metrics for metrics in after) else []
    head = ["round>", "state", "took>", "overhead>", "accuracy>", "loss>", *("test accuracy>" for _ in tests)]
    terminal.table(
        [*head, "down>", "up>", "answered", "dropped"],
        [
            [
                item.number,
                item.state,
                duration(item.seconds),
                duration(item.overhead_s),
                share(metrics.get("val_accuracy")),
                share(metrics.get("val_loss")),
                *(share(metrics.get(name)) for name in tests),
                size(item.bytes_down),
                size(item.bytes_up),
                ", ".join(site.site for site in item.sites if site.answered and not site.dropped),
                "; ".join(f"{site.site}: {site.dropped}" for site in (*item.sites, *item.evaluators) if site.dropped),
            ]
            for item, metrics in zip(rounds, after, strict=False)
        ],
        empty="no rounds yet",
    )


def round_line(item: RoundAnswer, rounds: int) -> str:
    """One closed round in one line: who answered, how good the weights were that it began with, training, the time."""
    counted = [site.site for site in item.sites if site.answered and not site.dropped]
    parts = [f"{len(counted)} of {len(item.sites)} sites answered ({', '.join(counted)})"]
    before = [f"{name} {item.metrics[name]:.4f}" for name in BEFORE_A_ROUND if name in item.metrics]
    if before:
        parts.append(f"{', '.join(before)} before it")
    if "train_loss" in item.metrics:
        parts.append(f"train_loss {item.metrics['train_loss']:.4f}")
    parts.append(duration(item.seconds))
    parts += [f"dropped {site.site}: {site.dropped}" for site in (*item.sites, *item.evaluators) if site.dropped]
    parts += [f"refused in the name of {refusal.site}: {refusal.code}" for refusal in item.refusals]
    return f"round {item.number}/{rounds}: {', '.join(parts)}"


def versions_table(terminal: Terminal, versions: Sequence[VersionAnswer]) -> None:
    """Model versions, one a line."""
    terminal.table(
        [
            "study",
            "version>",
            "state",
            "run",
            "rounds>",
            "accuracy>",
            "loss>",
            "size>",
            "created",
            "accepted",
            "rejected",
        ],
        [
            [
                item.study,
                item.version,
                item.state if item.bytes_kept else f"{item.state}, bytes deleted",
                item.run_id,
                item.rounds,
                share(item.metrics.get("val_accuracy")),
                share(item.metrics.get("val_loss")),
                size(item.size_bytes),
                moment(item.created_at),
                _sites(item, "accepted"),
                _sites(item, "rejected"),
            ]
            for item in versions
        ],
        empty="no versions yet",
    )


def _sites(version: VersionAnswer, state: str) -> str:
    return ", ".join(item.site for item in version.decisions if item.state == state)


def version_details(terminal: Terminal, version: VersionAnswer) -> None:
    """Everything about one version: where it comes from, its metrics, its confusion matrix, what the sites say."""
    manifest = version.manifest.body
    terminal.fields(
        [
            ("study", version.study),
            ("version", version.version),
            ("state", version.state),
            ("created", moment(version.created_at)),
            ("run", version.run_id),
            ("rounds", version.rounds),
            ("base version", manifest.base_version),
            ("sites", ", ".join(manifest.sites)),
            ("examples", manifest.examples),
            ("size", size(version.size_bytes)),
            ("bytes kept", "" if version.bytes_kept else "no"),
            ("SHA-256", version.digest),
            ("signed by", version.manifest.key_id),
            *((name, share(value)) for name, value in sorted(version.metrics.items())),
        ]
    )
    classes = manifest.data.classes
    if len(version.confusion) == len(classes):
        terminal.line()
        confusion_table(terminal, classes, version.confusion)
    if version.decisions:
        terminal.line()
        terminal.table(
            ["site", "decision", "person", "decided", "held-out accuracy>", "reason"],
            [
                [
                    item.site,
                    item.state,
                    item.person,
                    moment(item.decided_at),
                    share(item.metrics.get("heldout_accuracy")),
                    item.reason,
                ]
                for item in version.decisions
            ],
        )


def confusion_table(terminal: Terminal, classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> None:
    """A confusion matrix: a row is the true class, a column what the model says."""
    rows = [[name, *counts] for name, counts in zip(classes, confusion, strict=True)]
    terminal.table(["true class", *(f"{name}>" for name in classes)], rows)


def comparison(terminal: Terminal, both: Comparison) -> None:
    """Two versions beside each other."""
    a, b = both.a, both.b
    head: list[Sequence[object]] = [
        ["state", a.state, b.state, ""],
        ["rounds", a.rounds, b.rounds, b.rounds - a.rounds],
        ["created", moment(a.created_at), moment(b.created_at), ""],
    ]
    rows = [
        [
            name,
            share(a.metrics.get(name)),
            share(b.metrics.get(name)),
            f"{difference:+.4f}",
        ]
        for name, difference in sorted(both.metric_differences.items())
    ]
    terminal.table([a.study, f"version {a.version}>", f"version {b.version}>", "difference>"], [*head, *rows])
    if not both.same_architecture:
        terminal.line("The two have different architectures: a run cannot go on from one to the other.")


def sites_table(terminal: Terminal, sites: Iterable[SiteAnswer]) -> None:
    """Hospitals, one a line."""
    terminal.table(
        ["site", "state", "node", "studies", "joined", "last seen", "software", "address"],
        [
            [
                _with_role(item.name, item.evaluates_only),
                item.state,
                "online" if item.node_online else "offline",
                ", ".join(item.studies),
                moment(item.joined_at),
                moment(item.last_seen_at),
                software_text(item),
                item.source_address,
            ]
            for item in sites
        ],
        empty="no sites; make an invite with: medhive-admin invite SITE",
    )


def software_text(site: SiteAnswer) -> str | None:
    """A hospital's version, and whether it is one that the coordinator works with."""
    if site.protocol is None or understood(site.protocol):
        return site.software
    side = "the hospital" if site.protocol < PROTOCOL else "the coordinator"
    return f"{site.software}, protocol {site.protocol}, not {PROTOCOL}: upgrade {side}"


def studies_table(terminal: Terminal, studies: Iterable[StudyAnswer]) -> None:
    """Studies, one a line."""
    terminal.table(
        ["study", "title", "task", "classes", "members", "newest version"],
        [
            [
                item.name,
                item.title,
                item.task,
                ", ".join(item.data.classes),
                ", ".join(item.members),
                "" if item.newest_version is None else item.newest_version,
            ]
            for item in studies
        ],
        empty="no studies",
    )
