"""What was paid for is kept and never paid for again; the ledger knows which step has paid for it."""

import json
from pathlib import Path

import pytest
from asking import GOOD, KEY, SAMPLES, SLOTS, ask, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Served, chat, raw, status

from common.answers import Verdict
from common.failures import NOT_JSON
from common.prompts import render
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


def test_what_redo_replaced_counts_for_the_budget_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", "04_judge")
    for tokens in (5, 3):
        store.end(store.begin("detector"), "detector", "ok", (tokens, 1))
        store.set_aside()
    store.end(store.begin("detector"), "detector", "ok", (2, 1))
    assert store.ledger()["calls"] == 1 and store.ledger()["input_tokens"] == 2
    assert Store(tmp_path / "answers.sqlite", "04_judge").tokens == [10, 3]
