"""One hospital's installation, opened: its settings, database, keys, identity and connection, handed around together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import structlog

from fl_client.gateway import Gateway
from fl_client.identity import Identity, JoinOutcome, Keys, NotJoined, checked, connect, join
from fl_client.jobs import Source
from fl_client.limits import Limits
from fl_client.settings import Settings
from fl_client.store import Store
from fl_client.trainer import Trainer
from medhive.errors import Conflict, MedHiveError
from medhive.signing import SigningKey
from medhive.spec import StudyData
from medhive.wire import AddressTrust

log = structlog.get_logger()

DATABASE = "site.db"
LOCK_LOOK_S = 0.02  # how soon a lock that was given back is noticed
FOLDERS = ("keys", "models", "ledger", "cache", "runs", "queue", "pulled")


class AlreadyRunning(Conflict):
    """Another process uses this state folder's node already."""

    code = "already-running"


@dataclass
class Site:
    """Everything that a command or the node works with. Close it when done.

    `identity` is replaced when the coordinator introduces itself anew.
    """

    settings: Settings
    store: Store
    keys: Keys
    identity: Identity
    gateway: Gateway

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the state folder of a site that has joined.

        Raises:
            NotJoined: it has not.
        """
        database = settings.state_dir / DATABASE
        if not database.exists():
            raise NotJoined("This hospital has not joined yet; run `medhive-site join` with the coordinator's invite.")
        store, keys = open_state(settings)
        identity = Identity.load(store)
        if settings.addresses and settings.addresses != identity.addresses:
            identity = replace(identity, addresses=settings.addresses)
        return cls(settings, store, keys, identity, connect(identity, keys, store, settings.extra_ca_file))

    def close(self) -> None:
        """Close the connection."""
        self.gateway.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def greet(self) -> bool:
        """Let the coordinator introduce itself, over its key, and keep what it says; whether it is reached otherwise now.

        A new SERVER_ADDRESS is kept too, once the coordinator has answered there.

        Raises:
            WrongAuthority: another coordinator answers.
            Unreachable: nobody answers.
        """
        answer, nonce = self.gateway.introduction()
        kept = Identity.load(self.store)
        identity = replace(kept, addresses=self.identity.addresses)
        identity = identity.after(checked(answer, identity.verify_key, nonce))
        if identity != kept:
            identity.save(self.store)
        changed, self.identity = identity.way != self.identity.way, identity
        if changed:
            tunnel = identity.address_trust == AddressTrust.TUNNEL
            self.gateway.use_trust(identity.trust(self.settings.extra_ca_file), sealed=tunnel)
        return changed

    def follow(self, key_id: str) -> bool:
        """Greet a coordinator that signs with another key than the one on record; whether it is reached otherwise now.

        Whoever it is, and whether he answers, is judged by what is verified next.
        """
        if key_id == self.identity.verify_key.key_id:
            return False
        try:
            return self.greet()
        except MedHiveError as error:
            log.info("coordinator.not-followed", reason=error.code)
            return False

    @property
    def name(self) -> str:
        """The site's name."""
        return self.identity.site

    @property
    def consent_key(self) -> SigningKey:
        """The key that signs."""
        return self.keys.consent_key()

    def now(self) -> datetime:
        """The present by the coordinator's clock: what this site writes into what it signs."""
        return self.gateway.now()

    def latest_now(self) -> datetime:
        """The later of the two clocks: what an own consent's end is judged by, so that neither clock can stretch it."""
        return max(self.gateway.now(), datetime.now(UTC))

    def folder(self, name: str) -> Path:
        """A folder of the state folder."""
        return self.settings.state_dir / name

    def data_dir(self, study: str) -> Path:
        """Where a study's data lie.

        As set for the study, else DATA_DIR/<study> if there is one, else what was pulled for it, else DATA_DIR.
        """
        own = self.store.study(study).data_dir
        if own is not None:
            return own
        possible = (self.settings.data_dir / study, self.pulled_dir(study))
        return next((folder for folder in possible if folder.exists()), self.settings.data_dir)

    def pulled_dir(self, study: str) -> Path:
        """Where scans that a PACS gave for a study lie, unless another folder was named."""
        return self.folder("pulled") / study

    def source(
        self, study: str, task: str, data: StudyData, statistics: dict[str, list[float]] | None = None
    ) -> Source:
        """A study's data as the trainer is told about them."""
        local = self.store.study(study)
        return Source(
            task=task,
            data=data,
            data_dir=self.data_dir(study),
            secret_file=self.keys.secret_file,
            class_map=dict(local.class_map),
            groups_csv=local.groups_csv,
            weights_file=local.weights_file,
            labels_csv=local.labels_csv,
            cache_dir=self.folder("cache"),
            cache_bytes=self.settings.cache_bytes,
            evaluates_only=self.identity.evaluates_only,
            statistics=statistics or {},
        )

    def limits(self) -> Limits:
        """What training may have of the machine, as set now."""
        return Limits.load(self.store)

    def trainer(self) -> Trainer:
        """A trainer of this process's own; close it when done."""
        return Trainer(self.limits)


def open_state(settings: Settings) -> tuple[Store, Keys]:
    """Open or make the state folder (mode 0700), whether or not the site has joined."""
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in FOLDERS:
        (settings.state_dir / name).mkdir(exist_ok=True, mode=0o700)
    return Store(settings.state_dir / DATABASE), Keys(settings.state_dir / "keys")


def join_site(settings: Settings, token: str, client_id: str = "") -> JoinOutcome:
    """Join with an invite, or continue as the site that the state folder already is; see `fl_client.identity.join`."""
    store, keys = open_state(settings)
    return join(
        settings.addresses,
        token,
        client_id or settings.client_id,
        keys=keys,
        store=store,
        extra_ca_file=settings.extra_ca_file,
    )


@contextmanager
def one_at_a_time(lock: Path, patience_s: float) -> Iterator[bool]:
    """Hold a lock among all threads and processes of this hospital; False when another had it all the time."""
    until = time.monotonic() + patience_s
    with lock.open("a+b") as file:
        while not (held := _locked(file.fileno())) and time.monotonic() < until:
            time.sleep(LOCK_LOOK_S)
        yield held


@contextmanager
def only_node(state_dir: Path) -> Iterator[None]:
    """Hold the state folder's node lock.

    Raises:
        AlreadyRunning: another process holds it.
    """
    path = state_dir / "node.lock"
    with path.open("a+b") as file:
        if not _locked(file.fileno()):
            raise AlreadyRunning(f"A node is running on {state_dir} already; stop it, or use another STATE_DIR.")
        yield


def _locked(descriptor: int) -> bool:
    """Take an advisory lock that the operating system drops when the process ends, however it ends."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return _locked_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _locked_on_windows(descriptor: int) -> bool:
    import msvcrt  # noqa: PLC0415 - Windows only

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
