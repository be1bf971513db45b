"""site.db: private, durable, shared by two processes, and opened by newer versions only."""

import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_client.settings import Settings
from fl_client.store import MIGRATIONS, InboxItem, KnownRun, Reply, Store, StudySettings
from medhive.errors import Conflict


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "site.db")


def test_only_the_owner_reads_it(store: Store) -> None:
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_a_newer_database_is_refused(store: Store) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute("INSERT INTO schema VALUES (999)")
    db.close()
    with pytest.raises(Conflict, match="upgrade this installation"):
        Store(store.path)


def test_opening_again_keeps_everything(store: Store) -> None:
    store.set_fact("colour", {"is": "green"})
    store.set_study(StudySettings("brain", Path("/data/x"), {"no tumour": "notumor"}))
    again = Store(store.path)
    assert again.fact("colour") == {"is": "green"}
    assert again.study("brain").class_map == {"no tumour": "notumor"}
    assert again.study("lungs") == StudySettings("lungs")
    again.set_fact("colour", None)
    assert store.fact("colour") is None


def test_a_database_of_the_first_release_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "site.db"
    with sqlite3.connect(path) as db:
        db.executescript(MIGRATIONS[0])
        db.executescript("CREATE TABLE schema (version INTEGER NOT NULL); INSERT INTO schema VALUES (1)")
        db.execute("INSERT INTO facts VALUES ('colour', '\"green\"')")
    db.close()
    store = Store(path)
    assert store.fact("colour") == "green"
    assert store.versions() == []
    with sqlite3.connect(path) as db:
        assert "asked" in {row[1] for row in db.execute("PRAGMA table_info(versions)")}
    db.close()


def test_an_answer_is_kept_once(store: Store) -> None:
    reply = Reply("RUN_1", "train", 3, "ab", b"payload", store.root / "runs" / "update")
    store.keep_reply(reply)
    assert store.reply("RUN_1", "train", 3, "ab") == reply
    assert store.reply("RUN_1", "train", 3, "cd") is None
    assert store.highest_round("RUN_1", "train") == 3
    assert store.highest_round("RUN_1", "evaluate") == -1
    with pytest.raises(Conflict):
        store.keep_reply(reply)


def test_a_killed_process_leaves_what_it_had_kept(store: Store) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fl_client.store import Reply, Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.keep_reply(Reply('RUN_1', 'train', 1, '', b'x', None))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.path)], check=False, timeout=60)
    assert done.returncode == -9
    assert store.highest_round("RUN_1", "train") == 1


def test_many_threads_write_at_once(store: Store) -> None:
    def write(number: int) -> None:
        store.keep_inbound(InboxItem(f"m{number}", {"flower_run": number}, b"p"))
        store.keep_run(KnownRun(f"RUN_{number}", "brain", "ready", 0, 3, False))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert len(store.inbox()) == len(store.runs()) == 40
    store.forget_inbound("m7")
    assert "m7" not in {item.message_id for item in store.inbox()}


def test_the_outbox_keeps_its_order(store: Store) -> None:
    numbers = [store.post("consent", f"/runs/RUN_{n}/consents", {"n": n}) for n in range(3)]
    store.delivered(numbers[0])
    store.refused(numbers[1], "too late")
    assert [item.body["n"] for item in store.outbox()] == [2]


def test_a_fact_is_changed_by_one_at_a_time(store: Store) -> None:
    store.set_fact("count", 0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _number: store.change_fact("count", lambda count: count + 1), range(40)))
    assert store.fact("count") == 40


def test_settings_come_from_short_or_long_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("mh2.a.b\n")
    monkeypatch.setenv("SERVER_ADDRESS", "https://a.example, b.example/")
    monkeypatch.setenv("CLIENT_ID", "north")
    monkeypatch.setenv("MEDHIVE_SITE_CLIENT_ID", "south")
    monkeypatch.setenv("JOIN_TOKEN", "mh2.secret.token")
    settings = Settings()
    assert settings.addresses == ("https://a.example", "https://b.example")
    assert settings.client_id == "south"
    assert settings.read_join_token() == "mh2.secret.token"
    assert "secret" not in repr(settings)
    monkeypatch.setenv("MEDHIVE_SITE_JOIN_TOKEN_FILE", str(token))
    assert Settings().read_join_token() == "mh2.a.b"
