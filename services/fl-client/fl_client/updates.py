"""New versions of a model at the hospital: fetched and checked, judged on its own held-out data, accepted or rejected.

A version counts as genuine when the coordinator signed its manifest and its bytes have the manifest's digest. Which
version is in use here (the champion) is the hospital's decision alone; a decision is signed, kept, and delivered when the
coordinator answers.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fl_client.acceptance import MAX_MODEL_BYTES
from fl_client.consents import DECISION, send_decision
from fl_client.jobs import Job, JobKind, Plan
from fl_client.local_round import Memory, newest_memory
from fl_client.site import Site, one_at_a_time
from fl_client.store import ChampionEntry, KnownVersion
from fl_client.trainer import Listener, Trainer
from medhive.client import Progress
from medhive.errors import BadSignature, Conflict, DigestMismatch, InvalidInput, NotAllowed, NotFound, TooLarge
from medhive.leftovers import sync_folder
from medhive.packing import sha256_file
from medhive.signing import sign
from medhive.spec import RunOptions, build_options
from medhive.states import DecisionState, VersionState
from medhive.wire import DecisionBody, Manifest, ManifestBody, VersionAnswer

# How many files one `predict` takes: more belong into several calls, whose results then come in portions.
MAX_PREDICTED = 100_000
# Node and commands would write the same file at once. Most versions are there by then; the node looks again by itself.
FETCH_LOCK, FETCH_PATIENCE_S = ".fetch.lock", 10.0
CANDIDATE, CHAMPION, LOCAL_ONLY = "candidate", "champion", "local_only"


class VersionGone(NotFound):
    """The coordinator no longer keeps the version's bytes."""

    code = "version-gone"


@dataclass(frozen=True)
class Update:
    """One line of `updates`: `state` is the coordinator's word, `decision` this hospital's, which `waits` to be made."""

    study: str
    version: int
    received_at: datetime
    rounds: int
    accuracy: float | None
    loss: float | None
    file: Path
    state: str
    decision: str
    in_use: bool
    reason: str
    waits: bool


@dataclass(frozen=True)
class Arrival:
    """A version that has just been fetched, or is offered anew; `candidate` when it waits for a decision."""

    version: KnownVersion
    candidate: bool


@dataclass(frozen=True)
class Decided:
    """`delivered` is False when the coordinator did not answer: the node will deliver the decision."""

    version: KnownVersion
    delivered: bool


# ---- fetching ------------------------------------------------------------------------------------------------------


def sync_versions(site: Site, study: str, on_progress: Progress | None = None) -> list[Arrival]:
    """Fetch what the coordinator offers to this site and does not lie here yet; note what it asks about (again).

    Returns:
        What came, and what lies here and waits for a decision from now on; nothing at a site that only evaluates, which
        uses none.

    Raises:
        BadSignature, DigestMismatch: a version is not what the coordinator signed.
        Unreachable: the coordinator does not answer.
    """
    if site.identity.evaluates_only:
        return []
    answers = sorted(site.gateway.versions(study), key=lambda item: item.version)
    arrivals = (_sync_version(site, answer, on_progress) for answer in answers)
    return [arrival for arrival in arrivals if arrival is not None]


def _sync_version(site: Site, answer: VersionAnswer, on_progress: Progress | None) -> Arrival | None:
    known = site.store.version(answer.study, answer.version)
    if known is None or not known.file.exists():
        offered = answer.state is VersionState.CANDIDATE or _waits(site, answer)
        if offered and answer.bytes_kept:
            return _arrived(site, fetch_version(site, answer, on_progress), answer)
    if known is None:
        return None
    wanted = _is_offered_again(site, known, answer)
    if known.offered != answer.state.value:
        site.store.keep_version(known.file, answer.manifest, answer.state.value)
    return _ask(site, known) if wanted else None


def _arrived(site: Site, fetched: KnownVersion, answer: VersionAnswer) -> Arrival:
    if fetched.decision != DecisionState.PENDING or not _waits(site, answer):
        return Arrival(fetched, False)
    # Not the candidate, and asked about all the same: the coordinator exported it to this site.
    return _ask(site, fetched) if answer.state is not VersionState.CANDIDATE else Arrival(fetched, True)


def note_export(site: Site, study: str, version: int) -> Arrival | None:
    """The coordinator has exported a version to this site: it wants a decision, unless it is in use or asked for already.

    `sync_versions` sees this by itself, but for a version whose decision was open, or made and left again: in the
    coordinator's books nothing about it changes then.
    """
    known = site.store.version(study, version)
    if known is None or site.store.champion(study) == version:
        return None
    waits_already = known.asked and known.decision == DecisionState.PENDING
    return None if waits_already else _ask(site, known)


def _ask(site: Site, known: KnownVersion) -> Arrival:
    site.store.reopen_decision(known.study, known.version)
    return Arrival(_known(site, known.study, known.version), True)


def fetch_version(site: Site, answer: VersionAnswer, on_progress: Progress | None = None) -> KnownVersion:
    """Fetch one version into the models folder, with its manifest beside it.

    Raises:
        BadSignature, DigestMismatch: it is not what the coordinator signed.
        VersionGone: the coordinator no longer keeps its bytes.
        TooLarge: it is larger than this hospital takes.
        Conflict: another program of this hospital is fetching one, and takes long.
    """
    manifest = check_manifest(site, answer.manifest, answer.study, answer.version)
    if not answer.bytes_kept:
        raise VersionGone(
            f"The coordinator no longer keeps version {answer.version} of {answer.study}; choose another.",
            version=answer.version,
        )
    if manifest.size_bytes > MAX_MODEL_BYTES:
        raise TooLarge(f"Version {answer.version} is larger than {MAX_MODEL_BYTES} bytes.", limit=MAX_MODEL_BYTES)
    with one_at_a_time(site.folder("models") / FETCH_LOCK, FETCH_PATIENCE_S) as held:
        if not held:
            raise Conflict("Another program of this hospital is fetching a version; try again when it has ended.")
        file = model_file(site, answer.study, answer.version)
        site.gateway.fetch_version(
            answer.study,
            answer.version,
            file,
            digest=manifest.digest,
            size_bytes=manifest.size_bytes,
            on_progress=on_progress,
        )
        _write_manifest(manifest_file(file), answer.manifest)
    site.store.keep_version(file, answer.manifest, answer.state.value)
    return _known(site, answer.study, answer.version)


def check_manifest(site: Site, manifest: Manifest, study: str, version: int) -> ManifestBody:
    """Return the body of a manifest that the coordinator signed for this version.

    Raises:
        BadSignature: it did not, or for another one.
    """
    site.follow(manifest.key_id)
    body = manifest.verify(site.identity.verify_key)
    if (body.study, body.version) != (study, version):
        raise BadSignature(
            f"The manifest is of version {body.version} of {body.study}, not of version {version} of {study}; nothing "
            "was fetched."
        )
    return body


def model_file(site: Site, study: str, version: int) -> Path:
    """Where a version's weights lie."""
    return site.folder("models") / study / f"{site.name}_FinalGlobal_v{version}.safetensors"


def manifest_file(model: Path) -> Path:
    """Where the manifest of a model lies: beside it."""
    return model.with_suffix(".manifest.json")


def own_layers_of(site: Site, known: KnownVersion) -> Path | None:
    """The layers that this site kept to itself in the run that made a version; None where it kept none."""
    body = known.manifest.body
    return keep_own_layers(site, body.study, body.run_id, body.rounds) if body.run_id else None


def keep_own_layers(site: Site, study: str, run_id: str, rounds: int) -> Path | None:
    """Keep a completed run's own layers beside the models: the folder of the run goes with its end."""
    kept = site.folder("models") / study / f"{site.name}_{run_id}_own.safetensors"
    newest = newest_memory(site.folder("runs") / run_id, Memory.OWN, rounds + 1)
    if newest is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(newest, kept)
        sync_folder(kept.parent)
    return kept if kept.exists() else None


def _write_manifest(path: Path, manifest: Manifest) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
    part.replace(path)


def _waits(site: Site, answer: VersionAnswer) -> bool:
    own = [decision.state for decision in answer.decisions if decision.site == site.name]
    return DecisionState.PENDING in own or (not own and answer.state is VersionState.CANDIDATE)


def _is_offered_again(site: Site, known: KnownVersion, answer: VersionAnswer) -> bool:
    """Whether the coordinator wants a new decision on what lies here: it waits for one, or it has rolled back to it.

    A version that was accepted and left again stays accepted in the coordinator's books, which then wait for nothing;
    the roll-back to it is a question all the same.
    """
    path = f"/studies/{known.study}/versions/{known.version}/decisions"
    if any(item.kind == DECISION and item.path == path for item in site.store.outbox()):
        return False
    became_candidate = answer.state is VersionState.CANDIDATE and known.offered != VersionState.CANDIDATE
    if became_candidate and site.store.champion(known.study) != known.version:
        return True
    return known.decision != DecisionState.PENDING and _waits(site, answer)


def _known(site: Site, study: str, version: int) -> KnownVersion:
    known = site.store.version(study, version)
    if known is None:
        raise NotFound(
            f"Version {version} of {study} does not lie here; `medhive-site updates` lists those that do.",
            study=study,
            version=version,
        )
    return known


# ---- listing -------------------------------------------------------------------------------------------------------


def list_updates(site: Site, study: str | None = None) -> list[Update]:
    """The versions that lie here, newest first."""
    champions = {name: site.store.champion(name) for name in {item.study for item in site.store.versions(study)}}
    return [
        Update(
            study=item.study,
            version=item.version,
            received_at=item.received_at,
            rounds=item.manifest.body.rounds,
            accuracy=item.manifest.body.metrics.get("val_accuracy"),
            loss=item.manifest.body.metrics.get("val_loss"),
            file=item.file,
            state=item.offered,
            decision=item.decision,
            in_use=champions[item.study] == item.version,
            reason=item.reason,
            waits=_is_undecided(item),
        )
        for item in site.store.versions(study)
    ]


def _is_undecided(known: KnownVersion) -> bool:
    """The candidate, or what the coordinator has asked this site about; a candidate that was overtaken waits for nobody."""
    open_to_decision = known.offered == VersionState.CANDIDATE or (
        known.asked and known.offered != VersionState.RETIRED
    )
    return known.decision == DecisionState.PENDING and open_to_decision


def history(site: Site, study: str) -> list[ChampionEntry]:
    """Which versions were put in use here, the last one first."""
    return site.store.champions(study)


def undecided(site: Site) -> list[Update]:
    """Versions that wait for a decision, newest first."""
    return [update for update in list_updates(site) if update.waits]


def only_study(site: Site, study: str | None) -> str:
    """The named study, or the only one that versions lie here of.

    Raises:
        InvalidInput: there are several, or none.
    """
    if study:
        return study
    studies = sorted({item.study for item in site.store.versions()})
    if len(studies) == 1:
        return studies[0]
    if not studies:
        raise NotFound("No version of any model lies here yet.")
    raise InvalidInput(f"Versions of several studies lie here ({', '.join(studies)}); name one.")


# ---- judging -------------------------------------------------------------------------------------------------------


def judge(
    site: Site,
    trainer: Trainer,
    study: str,
    version: int,
    *,
    local_only: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Evaluate a version on the own held-out data beside the one in use and, if asked, one trained on own data alone.

    Returns:
        `evaluations` (by `candidate`, `champion`, `local_only`), each `tasks.evaluation.Evaluation` as JSON;
        `comparisons` of the candidate with each other, `tasks.evaluation.Comparison` as JSON; `champion_version`.

    Raises:
        NotFound: the version does not lie here.
        JobFailed: the data do not allow it; `cause_code` names why.
    """
    known = _known(site, study, version)
    models = {CANDIDATE: known}
    champion = site.store.champion(study)
    if champion is not None and champion != version:
        models[CHAMPION] = _known(site, study, champion)
    weights = {name: item.file for name, item in models.items()}
    own = {name: path for name, item in models.items() if (path := own_layers_of(site, item)) is not None}
    body = known.manifest.body
    job = Job(
        id=_job_id("judge"),
        kind=JobKind.JUDGE,
        source=site.source(study, body.task, body.data, body.statistics),
        device=site.limits().device,
        weights=weights,
        own=own,
    )
    result = _run(trainer, job, listener)
    if local_only:
        weights[LOCAL_ONLY] = _local_only(site, trainer, known, result["fingerprint"], listener)
        result = _run(trainer, job.model_copy(update={"id": _job_id("judge"), "weights": weights}), listener)
    judgement = {
        "evaluations": result["evaluations"],
        "comparisons": result["comparisons"],
        "champion_version": champion,
        "at": site.now().isoformat(),
    }
    site.store.keep_evaluation(study, version, judgement)
    return judgement


def _run(trainer: Trainer, job: Job, listener: Listener | None) -> dict[str, Any]:
    return trainer.run(job, listener) if listener else trainer.run(job)


def _local_only(site: Site, trainer: Trainer, known: KnownVersion, fingerprint: str, listener: Listener | None) -> Path:
    """A model of the same recipe on the own data alone, made once for the same data and recipe."""
    body = known.manifest.body
    options = _recipe(site, body)
    recipe = {
        "data": fingerprint,
        "study": body.data.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
    }
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    file = site.folder("cache") / f"local-only-{body.study}-{name}.safetensors"
    if file.exists():
        return file
    plan = Plan(
        round=1,
        rounds=options.rounds,
        local_epochs=options.local_epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        penalty=options.penalty,
        C=options.C,
    )
    job = Job(
        id=_job_id("local-only"),
        kind=JobKind.LOCAL_ONLY,
        source=site.source(body.study, body.task, body.data),
        device=site.limits().device,
        plan=plan,
        out=file,
    )
    if listener:
        trainer.run(job, listener)
    else:
        trainer.run(job)
    return file


def _recipe(site: Site, body: ManifestBody) -> RunOptions:
    """The options of the run that made the version, as this hospital consented to them or as the coordinator tells."""
    if body.run_id is None:
        return build_options(body.task, {}, {})
    given = site.store.consent(body.run_id)
    return given.spec.options if given is not None else site.gateway.run(body.run_id).spec.options


def _job_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(4)}"


def heldout_metrics(judgement: dict[str, Any] | None) -> dict[str, float]:
    """The few numbers of a judgement that go into a signed decision."""
    if judgement is None:
        return {}
    found: dict[str, float] = {}
    for name, evaluation in judgement["evaluations"].items():
        prefix = "heldout" if name == CANDIDATE else f"heldout_{name}"
        found[f"{prefix}_accuracy"] = evaluation["accuracy"]["value"]
        found[f"{prefix}_macro_f1"] = evaluation["macro_f1"]["value"]
        found[f"{prefix}_loss"] = evaluation["loss"]
        found[f"{prefix}_examples"] = float(evaluation["examples"])
        found |= {f"{prefix}_{figure}": value for figure, value in evaluation.get("own", {}).items()}
    return found


# ---- deciding ------------------------------------------------------------------------------------------------------


def accept(site: Site, study: str, version: int, *, person: str, reason: str = "") -> Decided:
    """Accept a version and put it in use.

    Raises:
        NotFound: it does not lie here.
        Conflict: it was accepted before; `rollback` puts an accepted version in use again.
        DigestMismatch: its file is not what the manifest says.
        MedHiveError: the coordinator's refusal; nothing is changed here then.
    """
    known = _known(site, study, version)
    if known.decision == DecisionState.ACCEPTED:
        raise Conflict(
            f"Version {version} of {study} was accepted before; use `medhive-site rollback` to return to it."
        )
    require_intact(known)
    return _decide(site, known, "accepted", person, reason)


def reject(site: Site, study: str, version: int, *, person: str, reason: str) -> Decided:
    """Reject a version; one that is in use gives its place to the one that was in use before.

    Raises:
        NotFound: it does not lie here.
        Conflict: it was rejected before.
        InvalidInput: a reason is missing.
        MedHiveError: the coordinator's refusal; nothing is changed here then.
    """
    if not reason.strip():
        raise InvalidInput("A rejection needs a reason.")
    known = _known(site, study, version)
    if known.decision == DecisionState.REJECTED:
        raise Conflict(f"Version {version} of {study} was rejected before.")
    return _decide(site, known, "rejected", person, reason)


def rollback(site: Site, study: str, version: int | None, *, person: str, reason: str = "") -> Decided:
    """Return to a version that was in use before, the last one when none is named; the present one is rejected.

    Raises:
        NotAllowed: there is no such version.
        DigestMismatch: its file is not what the manifest says.
        MedHiveError: the coordinator's refusal.
    """
    present = site.store.champion(study)
    target = version if version is not None else _previous(site, study, present)
    if target is None or present is None or target not in {entry.version for entry in history(site, study)}:
        raise NotAllowed(f"No earlier version of {study} was in use here; `medhive-site history` shows which were.")
    if target == present:
        raise Conflict(f"Version {target} of {study} is in use already.")
    known, words = _known(site, study, target), reason or f"rolled back to version {target}"
    require_intact(known)
    delivered = True
    if _known(site, study, present).decision == DecisionState.ACCEPTED:
        delivered = _decide(site, _known(site, study, present), "rejected", person, words).delivered
    if known.decision != DecisionState.ACCEPTED:
        return _decide(site, known, "accepted", person, words)
    site.store.use_version(study, target, person=person, reason=words)
    return Decided(_known(site, study, target), delivered)


def _previous(site: Site, study: str, present: int | None) -> int | None:
    rejected = {item.version for item in site.store.versions(study) if item.decision == DecisionState.REJECTED}
    others = (entry.version for entry in history(site, study))
    return next((number for number in others if number != present and number not in rejected), None)


def _decide(
    site: Site, known: KnownVersion, decision: Literal["accepted", "rejected"], person: str, reason: str
) -> Decided:
    if not person.strip():
        raise InvalidInput("A decision needs the name of the person who makes it.")
    body = DecisionBody(
        site=site.name,
        study=known.study,
        version=known.version,
        digest=known.digest,
        decision=decision,
        reason=reason,
        person=person.strip(),
        metrics=heldout_metrics(known.evaluation),
        issued_at=site.now(),
    )
    delivered = send_decision(site, sign(body, site.consent_key))
    site.store.decide(known.study, known.version, decision, person=person.strip(), reason=reason)
    return Decided(_known(site, known.study, known.version), delivered)


def require_intact(known: KnownVersion) -> None:
    """Refuse a model file that is not what the signed manifest says.

    Raises:
        DigestMismatch: its bytes have changed.
        NotFound: it is gone.
    """
    if sha256_file(known.file) != known.manifest.body.digest:
        raise DigestMismatch(
            f"{known.file.name} was changed since it was fetched; delete it, and the node fetches it again.",
            version=known.version,
        )


# ---- using ---------------------------------------------------------------------------------------------------------


def predict(
    site: Site,
    trainer: Trainer,
    path: Path,
    *,
    study: str | None = None,
    version: int | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Class probabilities of a file, or of every file in a folder, by the version in use or a named one.

    Returns:
        Per example `name` with `label` and `probabilities`, or with `skipped` and the reason.

    Raises:
        NotFound: there is no such file, or no version in use.
        JobFailed: the task cannot read it; `cause_code` names why.
    """
    name = only_study(site, study)
    number = version if version is not None else site.store.champion(name)
    if number is None:
        raise NotFound(f"No version of {name} is in use here; accept one first, or name one with --version.")
    known = _known(site, name, number)
    require_intact(known)
    body = known.manifest.body
    own = own_layers_of(site, known)
    job = Job(
        id=_job_id("predict"),
        kind=JobKind.PREDICT,
        source=site.source(name, body.task, body.data, body.statistics),
        device=site.limits().device,
        weights={"base": known.file},
        own={"base": own} if own is not None else {},
        paths=tuple(_files_in(path)),
    )
    return list(_run(trainer, job, listener)["predictions"])


def _files_in(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path.resolve()]
    if not path.is_dir():
        raise NotFound(f"There is no file or folder {path}.")
    files = sorted(item.resolve() for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
    if not files:
        raise NotFound(f"The folder {path} holds no file.")
    if len(files) > MAX_PREDICTED:
        raise TooLarge(f"The folder {path} holds more than {MAX_PREDICTED} files; predict on parts of it.")
    return files
