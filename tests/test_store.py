"""What was paid for is kept and never paid for again; the ledger knows which step has paid for it."""

import argparse
import json
import sqlite3
from pathlib import Path

import pytest
from asking import GOOD, KEY, SAMPLES, SLOTS, ask, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Served, chat, raw, status

from common.answers import Verdict
from common.failures import NOT_JSON
from common.prompts import render
from common.run_folder import launch
from common.store import Store


def test_an_answer_is_paid_for_once(server: Served, tmp_path: Path) -> None:
    for _ in range(2):  # the second client finds what the first has paid for
        (verdict,) = ask(server.url, tmp_path)
        assert (verdict.reason, verdict.verdict, verdict.tokens) == ("好 <ok>", 1, (11, 7))
    (request,) = server.asked
    assert (request["model"], request["temperature"], request["seed"]) == ("m", 0.0, 0)
    assert request["messages"] == render("detector", **SLOTS)
    assert request["response_format"]["json_schema"]["schema"] == Verdict.model_json_schema()
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_the_same_question_asked_twice_at_once_sends_one_request(server: Served, tmp_path: Path) -> None:
    assert [v.verdict for v in ask(server.url, tmp_path, {}, {}, {"sample": 1})] == [1, 1, 1]
    assert len(server.asked) == 2


@pytest.mark.parametrize("name", ["temperature", "sample", "response", "model", "seed", "prompts", "base_url"])
def test_a_changed_question_is_asked_again(server: Served, tmp_path: Path, name: str) -> None:
    (tmp_path / "detector.md").write_text("{{ principles }} {{ query }} {{ response }}")
    question = {"temperature": 0.7, "sample": 1, "response": "别的"}
    changed = {"model": "n", "seed": 5, "prompts": tmp_path, "base_url": server.url.replace("127.0.0.1", "localhost")}
    question, changed = ({k: v for k, v in both.items() if k == name} for both in (question, changed))
    for _ in range(2):
        ask(server.url, tmp_path)
        ask(server.url, tmp_path, question, **changed)
    assert len(server.asked) == 2


def test_the_ledger_equals_what_the_endpoint_counted(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [chat("?"), chat(""), status(500), status(429), GOOD]
    ask(server.url, tmp_path, {}, {}, {"sample": 1}, {"sample": 2})
    ask(server.url, tmp_path, {}, {"sample": 3})  # one is cached; the ledger goes on
    found = ledger(tmp_path)
    assert (found["calls"], found["retries"]) == (len(server.asked), 4) == (8, 4)
    assert (found["input_tokens"], found["output_tokens"]) == server.billed
    assert found["outcomes"] == {"HTTP 500": 1, NOT_JSON: 1, "rate limit": 1, "empty": 1, "ok": 4}
    assert Store(tmp_path / "answers.sqlite").ledger("judge")["calls"] == 0


def test_a_step_is_booked_what_it_has_asked_itself(server: Served, tmp_path: Path) -> None:
    """Step 3 asked again after step 4 has asked the same role: nothing of step 4 is on its bill."""
    ask(server.url, tmp_path, *SAMPLES[:2], step="03")
    ask(server.url, tmp_path, *SAMPLES[:7], step="04_judge")  # two of them were paid for by step 3
    ask(server.url, tmp_path, *SAMPLES[:8], step="03")
    assert [ledger(tmp_path, step)["calls"] for step in ("03", "04_judge", "05")] == [3, 5, 0]
    assert ledger(tmp_path)["input_tokens"] == 3 * 11
    whole = Store(tmp_path / "answers.sqlite")
    assert sum(whole.tokens) == sum(server.billed) == 8 * 18  # a --budget is of the whole run folder


def test_what_a_killed_process_had_under_way_is_booked_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    killed = Store(path, "03")
    killed.end(killed.begin("detector"), "detector", "ok", (11, 7), key="k", text="{}")
    killed.begin("detector")
    killed.begin("generator")
    Store(path, "05").settle()
    Store(path, "05").settle()
    assert Store(path, "03").ledger("detector")["outcomes"] == {"killed": 1, "ok": 1}
    assert Store(path, "03").ledger()["calls"] == 3 and Store(path, "05").ledger()["calls"] == 0


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 5}])
def test_an_answer_without_full_usage_is_taken(server: Served, tmp_path: Path, usage: dict | None) -> None:
    server.replies[:] = [raw(json.loads(GOOD.body) | {"usage": usage})]
    assert ask(server.url, tmp_path)[0].verdict == 1
    assert ledger(tmp_path)["output_tokens"] == 0


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "11", "completion_tokens": "7"}, (11, 7)),
        ({"prompt_tokens": 11.0, "completion_tokens": 7.0, "total_tokens": 18.0}, (11, 7)),
        ({"prompt_tokens": "11", "total_tokens": 18}, (11, 7)),
        ({"prompt_tokens": None, "completion_tokens": "many", "total_tokens": [18]}, (0, 0)),
        ({"prompt_tokens": -11, "completion_tokens": 7}, (0, 7)),
        ({"prompt_tokens": 1e300, "completion_tokens": 10**40, "total_tokens": {}}, (0, 0)),
    ],
)
def test_counts_in_any_spelling_are_booked_and_what_is_no_number_is_none(
    server: Served, tmp_path: Path, usage: dict, tokens: tuple[int, int]
) -> None:
    server.replies[:] = [raw(json.loads(GOOD.body) | {"usage": usage})]
    assert ask(server.url, tmp_path)[0].tokens == tokens and len(server.asked) == 1
    assert (ledger(tmp_path)["input_tokens"], ledger(tmp_path)["output_tokens"]) == tokens


@pytest.mark.parametrize("usage", [None, {}, {"input_tokens": 5}])
def test_a_budget_that_cannot_be_kept_stops_the_run_at_the_first_answer(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], usage: dict | None
) -> None:
    server.replies[:] = [raw(json.loads(GOOD.body) | {"usage": usage})]
    with pytest.raises(SystemExit) as end:
        ask(server.url, tmp_path, *SAMPLES, concurrency=1, budget=50)
    assert end.value.code == 2 and "no usage" in capsys.readouterr().err and len(server.asked) == 1
    assert len(ask(server.url, tmp_path, *SAMPLES)) == len(server.asked) == 12, "the answer was kept"


def test_a_total_alone_counts_as_the_dearer_tokens(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [raw(json.loads(GOOD.body) | {"usage": {"total_tokens": 18}})]
    ask(server.url, tmp_path)
    assert (ledger(tmp_path)["input_tokens"], ledger(tmp_path)["output_tokens"]) == (0, 18)


def test_what_redo_replaced_counts_for_the_budget_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", "04_judge")
    for tokens in (5, 3):
        store.end(store.begin("detector"), "detector", "ok", (tokens, 1))
        store.set_aside()
    store.end(store.begin("detector"), "detector", "ok", (2, 1))
    assert store.ledger()["calls"] == 1 and store.ledger()["input_tokens"] == 2
    assert Store(tmp_path / "answers.sqlite", "04_judge").tokens == [10, 3]


def locked(path: Path) -> sqlite3.Connection:
    """Another program that holds the database for itself; it lets go when it is collected."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    return other


def damaged(path: Path) -> None:
    """The pages after the first are overwritten, as by a disk that fails."""
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\x07" * (len(whole) - 4096))


TROUBLES = {  # what is done to answers.sqlite, and what the one line says
    "locked": (locked, "database is locked; make room"),
    "damaged": (damaged, "malformed; "),
    "something else": (lambda path: path.write_bytes(b"not a database" * 500), "not a database; "),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "unable to open database file; make room"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_database_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    path, (spoil, said) = tmp_path / "answers.sqlite", TROUBLES[trouble]
    store = Store(path, "03")
    for number in range(200):
        store.end(store.begin("detector"), "detector", "ok", (5, 1), key=f"k{number}", text="好" * 200)
    store.db.close()
    held = spoil(path)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **options | {"timeout": 0.1}))
    refused_in_one_line(tmp_path, capsys, said)
    del held


@pytest.mark.parametrize(
    ("limit", "said"), [("query_only=1", "readonly database; make room"), ("max_page_count=1", "full; make room")]
)
def test_a_database_that_takes_nothing_more_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: str, said: str
) -> None:
    """A disk that is read-only or full: SQLite's own limits stand in for it, as root may write everywhere."""
    Store(tmp_path / "answers.sqlite")
    connect = sqlite3.connect

    def limited(path: Path, **options: object) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.execute(f"PRAGMA {limit}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", limited)
    refused_in_one_line(tmp_path, capsys, said)


def refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    """A script that books many answers, started on this run folder, ends with one line that says this."""

    def main(args: argparse.Namespace) -> int:
        store = Store(args.run / "answers.sqlite", "03")
        for number in range(500):
            store.get(f"k{number}")
            store.end(store.begin("detector"), "detector", "ok", (5, 1), key=f"new {number}", text="好" * 200)
        return 0

    with pytest.raises(SystemExit) as end:
        launch(main, argparse.Namespace(run=run))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: {run / 'answers.sqlite'}: ") and said in line, line
