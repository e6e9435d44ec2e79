"""The client: a failed answer is no answer, the rest is asked again, and what stops the run does so in one line."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from asking import GOOD, KEY, SAMPLES, SLOTS, ask, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import TOKENS, Reply, Served, chat, endpoint, raw, settings, status
from tqdm import tqdm

from common import run_folder
from common.answers import Points, Verdict
from common.client import Client, gather_or_unusable
from common.failures import Unusable
from common.prompts import render
from common.run_folder import ROOT, slow_bar


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (status(500), "HTTP 500", 5), (status(429), "rate limit", 31), (Reply(drop=0), "connection", 5),
        (replace(GOOD, drop=9), "connection", 5),
        (status(400), "HTTP 400", 3), (raw({"error": {"message": "busy"}}), "HTTP 500", 5), (raw({}), "no choice", 3),
        (chat(""), "empty", 3), (chat(None), "empty", 3), (chat(None, refusal="不行"), "refusal", 3),
        (chat('{"reason": "好", "verdict": 1}', "length"), "cut at the token limit", 2),
        (chat('{"reason": "好", "verdict": 1}', "content_filter"), "content filter", 1),
        (replace(raw({"error": {"code": "content_filter", "message": "not this"}}), status=400), "content filter", 1),
        (status(400, "Content Exists Risk"), "content filter", 1),
        (status(403, "sensitive words"), "content filter", 1),
        (status(400, "names are case-sensitive"), "HTTP 400", 3),
    ],
)  # fmt: skip
def test_no_answer_is_unusable(server: Served, tmp_path: Path, reply: Reply, reason: str, requests: int) -> None:
    server.replies[:] = [reply]
    with pytest.raises(Unusable) as end:
        ask(server.url, tmp_path)
    assert (str(end.value), len(server.asked), ledger(tmp_path)["outcomes"]) == (reason, requests, {reason: requests})
    server.replies[:] = [GOOD]
    assert ask(server.url, tmp_path)[0].verdict == 1, "a failure must not be cached"


@pytest.mark.parametrize(
    ("last", "reason"), [(status(413), "HTTP 413"), (chat(""), "empty"), (chat("", "content_filter"), "content filter")]
)
def test_a_question_that_fails_in_several_ways_comes_to_an_end(
    server: Served, tmp_path: Path, last: Reply, reason: str
) -> None:
    """What is worth fewer attempts than were made already is not asked again."""
    server.replies[:] = [status(500), status(500), status(500), last]
    with pytest.raises(Unusable, match=reason):
        ask(server.url, tmp_path)
    assert len(server.asked) == 4


REFUSED = {  # a case -> (what the endpoint looks at, the value that it takes, how it refuses any other)
    "max_tokens": (
        "max_tokens",
        None,
        status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."),
    ),
    "temperature": ("temperature", 1, status(400, "'temperature' does not support 0.0 with this model, only 1.")),
    "seed": ("seed", None, replace(raw({"detail": [{"loc": ["body", "seed"], "msg": "no such field"}]}), status=422)),
    "seed by param": ("seed", None, replace(raw({"error": {"message": "Unknown field", "param": "seed"}}), status=400)),
    "system": ("system", None, status(400, "this model takes no system message")),
    "roles": ("system", None, status(400, "Conversation roles must alternate user/assistant/user/assistant/...")),
    "template": ("system", None, status(500, "Jinja Exception: System role not supported")),
    # llama-cpp-python's server, of its own checks.
    "validation": (
        "response_format",
        None,
        status(500, "1 validation error: {'type': 'literal_error', 'loc': ('body', 'response_format', 'type')}"),
    ),
    "in a 200": ("seed", None, raw({"error": {"message": "seed: unknown field", "code": 400}})),
    "schema": ("response_format", None, status(400, "This response_format type is unavailable now")),
    "spaced": ("response_format", None, status(400, "Response format: not known here")),
    "grammar": ("response_format", None, status(422, "the grammar cannot be built")),
    "enum": ("response_format", None, status(400, "an enum may hold strings only (TYPE_STRING), not 0")),
}

NAMELESS = {"system", "roles", "template", "spaced", "grammar", "enum"}  # no part of a request is named: refused twice


def picky(*cases: str) -> Callable[[dict], Reply]:
    """An endpoint that refuses, in turn, what these cases say."""

    def reply(request: dict) -> Reply:
        found = request | {message["role"]: message for message in request["messages"]}
        for what, taken, refusal in map(REFUSED.get, cases):
            if found.get(what, taken) != taken:
                return refusal
        return GOOD

    return reply


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_endpoint_refuses_is_learnt_once_and_told_once(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    server.replies[:] = [picky(case)]
    assert [v.verdict for v in ask(server.url, tmp_path, *SAMPLES, concurrency=1, attempts=1)] == [1] * 12
    asked = 13 + (case in NAMELESS)
    assert len(server.asked) == asked
    assert capsys.readouterr().err.count(f"detector: takes no {REFUSED[case][0]}: ") == 1
    first, last = server.asked[0], server.asked[-1]
    changed = {name for name in first.keys() | last.keys() if first.get(name) != last.get(name)} - {"seed"}
    assert changed <= {REFUSED[case][0], "max_completion_tokens", "messages"}, "the rest is sent as before"
    server.replies[:] = [GOOD]
    assert ask(server.url, tmp_path, *SAMPLES)[0].verdict == 1 and len(server.asked) == asked  # from what was paid for


def test_several_things_that_are_refused_are_learnt_one_after_another(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [picky("grammar", "max_tokens", "temperature", "seed", "system")]
    ask(server.url, tmp_path, *SAMPLES, concurrency=1, attempts=1)
    last = server.asked[-1]
    assert len(server.asked) == 12 + 5 + 2 and last.keys() == {"model", "messages", "max_completion_tokens"}
    assert last["max_completion_tokens"] == 1024 and [m["role"] for m in last["messages"]] == ["user"]
    texts = [message["content"] for message in render("detector", **SLOTS)]
    assert last["messages"][0]["content"] == "\n\n".join(texts)


def test_a_schema_that_one_role_alone_may_not_have_is_left_out(server: Served, tmp_path: Path) -> None:
    """Step 1's integer enum: points are answered, a verdict's schema is refused."""
    refusal = REFUSED["enum"][2]
    server.replies[:] = [lambda request: refusal if '"enum"' in json.dumps(request) else chat('{"points": []}'), GOOD]

    async def asking() -> list:
        async with Client(settings(server.url, run=tmp_path), "01") as client:
            slots = {"query": "教师节", "response": "老师好。", "examples": []}
            points = await client.ask("positive", Points, **slots)
            server.replies[:] = [lambda request: refusal if "response_format" in request else GOOD]
            return [points, await client.ask("judge", Verdict, positive=[], negative=[], **slots)]

    points, verdict = asyncio.run(asking())
    assert (points.points, verdict.verdict, len(server.asked)) == ([], 1, 4)


@pytest.mark.parametrize("words", ["Bad request", "System error, try again", ""])
@pytest.mark.parametrize("code", [400, 422])
def test_a_chance_refusal_that_names_nothing_changes_no_request(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, words: str
) -> None:
    chance = status(code, words)
    for run, replies in enumerate(([chance], [chance, chance, status(500)])):  # the last: the changed one is not taken
        server.asked.clear()
        server.replies[:] = [*replies, GOOD]
        verdicts = ask(server.url, tmp_path / str(run), *SAMPLES, concurrency=1, attempts=2)
        assert [v.verdict for v in verdicts] == [1] * 12 and len(server.asked) == 12 + len(replies)
        assert server.asked[0] == server.asked[1]
        for request in server.asked[len(replies) :]:
            assert request.keys() == server.asked[0].keys() and request["messages"][0]["role"] == "system"
    assert "takes no" not in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [0, 5], ids=["first", "later"])
def test_a_question_that_is_refused_for_itself_changes_nothing_for_others(
    server: Served, tmp_path: Path, wrong: int
) -> None:
    refusal = status(400, "inappropriate content")
    server.replies[:] = [lambda request: refusal if "蓝鲸" in request["messages"][-1]["content"] else GOOD]
    questions = [{"response": "蓝鲸" if n == wrong else f"第{n}"} for n in range(8)]
    answers = ask_on(server.url, tmp_path, *questions)
    assert [n for n, answer in enumerate(answers) if isinstance(answer, Unusable)] == [wrong]
    # The first question is asked twice as it is, and then without a schema.
    assert len(server.asked) == (8 if wrong else 10)
    assert sum("response_format" in request for request in server.asked) == (8 if wrong else 9)


def test_a_refusal_of_what_was_not_sent_is_the_end(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [REFUSED["schema"][2]]
    with pytest.raises(Unusable):
        ask(server.url, tmp_path)
    assert len(server.asked) == 2


def ask_on(url: str, run: Path, *questions: dict, **changed: object) -> list[Verdict | Unusable]:
    """The answers to some questions, one after another, also after one that has none."""

    async def asking() -> list:
        async with Client(settings(url, run=run, **{"concurrency": 1} | changed), "03") as client:
            return await gather_or_unusable(*(client.ask("detector", Verdict, **SLOTS | q) for q in questions))

    return asyncio.run(asking())


def stopped(capsys: pytest.CaptureFixture[str], url: str, run: Path, *questions: dict, **changed: object) -> str:
    """The one line in which asking these ends."""
    with pytest.raises(SystemExit) as end:
        ask_on(url, run, *questions or [{}], **changed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "reply",
    [
        status(400, "tenant unknown"), status(403, "tenant unknown"), status(413, "tenant unknown"),
        replace(raw({"detail": "tenant unknown"}), status=422), status(503, "tenant unknown"),
        raw({"error": {"message": "tenant unknown", "code": 500}}), chat("tenant unknown"),
    ],
)  # fmt: skip
def test_where_every_question_fails_alike_the_run_stops_with_the_endpoints_words(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    server.replies[:] = [reply]
    many = [{"sample": n} for n in range(60)]
    assert "tenant unknown" in stopped(capsys, server.url, tmp_path, *many, concurrency=2, attempts=2)
    assert len(server.asked) <= 30


def test_it_goes_on_where_the_role_was_answered_before_or_failures_differ(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [status(409 + n % 3 + 1, "no") for n in range(11)] + [GOOD]
    answers = ask_on(server.url, tmp_path, *SAMPLES)
    assert [isinstance(answer, Unusable) for answer in answers] == [True] * 11 + [False]
    server.replies[:] = [status(403, "not this text")]  # all that a resumed run has left to ask
    assert all(isinstance(answer, Unusable) for answer in ask_on(server.url, tmp_path, *SAMPLES[:11]))


def refuses(status_code: int, **error: object) -> Reply:
    return replace(raw({"error": error}), status=status_code)


@pytest.mark.parametrize(
    "reply",
    [
        status(402, "the balance is 0"), refuses(429, message="pay in first", code="insufficient_quota"),
        refuses(403, message="AccountOverdueError"), refuses(429, message="余额不足或无可用资源包", code="1113"),
        refuses(400, message="Access denied", type="Arrearage"), refuses(200, message="no credits", code=402),
        refuses(200, message="pay in first", type="insufficient_quota"),
        refuses(429, message="You have used all available credits"), refuses(403, message="spending limit reached"),
        refuses(429, message="your balance is insufficient"),
    ],
)  # fmt: skip
def test_an_empty_account_stops_the_run(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    server.replies[:] = [GOOD, GOOD, reply]
    assert "wants to be paid" in stopped(capsys, server.url, tmp_path, *SAMPLES)
    assert len(server.asked) == 3
    server.replies[:] = [GOOD]
    assert len(ask(server.url, tmp_path, *SAMPLES)) == 12 and len(server.asked) == 13


@pytest.mark.parametrize(
    ("error", "reason", "requests"),
    [
        ({"message": "slow down", "code": 429}, "", 3), ({"message": "slow down", "type": "rate_limit"}, "", 3),
        ({"message": "busy"}, "", 3), ("busy", "", 3), ({"message": "busy", "code": "502"}, "", 3),
        ({"message": "not this", "code": 403}, "HTTP 403", 1), ({"message": "", "code": 401}, "stop", 1),
        ({"message": "no", "code": "404"}, "stop", 1),
    ],
)  # fmt: skip
def test_an_error_in_a_reply_of_status_200_is_that_error(
    server: Served, tmp_path: Path, error: object, reason: str, requests: int
) -> None:
    server.replies[:] = [raw({"error": error}), raw({"error": error, "choices": []}), GOOD]
    if reason:
        with pytest.raises((Unusable, SystemExit), match="2" if reason == "stop" else reason):
            ask(server.url, tmp_path)
    else:
        assert ask(server.url, tmp_path)[0].verdict == 1
    assert len(server.asked) == requests


@pytest.mark.parametrize(("path", "asks"), [("/v1", False), ("", True)])
def test_a_404_shows_what_it_says_and_asks_for_v1(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, asks: bool
) -> None:
    server.replies[:] = [replace(raw({"detail": f"nobody offers this model, {KEY}"}), status=404)]
    line = stopped(capsys, server.url.removesuffix("/v1") + path, tmp_path)
    assert "nobody offers this model, ***" in line and "--model" in line and ("/v1 missing" in line) == asks


def test_a_cut_answer_is_asked_for_with_more_room(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [chat('{"reason": "好', "length"), GOOD]
    assert ask(server.url, tmp_path)[0].verdict == 1
    first, second = (request["max_tokens"] for request in server.asked)
    assert second == 2 * first


def test_a_question_that_failed_is_not_asked_again_by_its_twin(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [status(400)]

    async def twice() -> list:
        async with Client(settings(server.url, run=tmp_path), "03") as client:
            asking = (client.ask("detector", Verdict, **SLOTS) for _ in range(2))
            return await asyncio.gather(*asking, return_exceptions=True)

    assert [str(e) for e in asyncio.run(twice())] == ["HTTP 400"] * 2 and len(server.asked) == 3


def test_a_budget_stops_the_run_and_keeps_what_was_bought(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    price = {"price_in": 1e6, "price_out": 0.0}  # 11 a call
    for budget, calls in (({"budget": 3 * 18}, 3), (price | {"budget": 5 * 11}, 5)):
        with pytest.raises(SystemExit) as end:
            ask(server.url, tmp_path, *SAMPLES, concurrency=1, **budget)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and "--budget" in line and len(server.asked) == calls
    assert len(ask(server.url, tmp_path, *SAMPLES, budget=1e9)) == len(server.asked) == 12


@pytest.mark.parametrize(("usage", "told", "asked"), [({}, "--budget", 3), ({"usage": None}, "no usage", 1)])
@pytest.mark.parametrize("ending", ["length", "content_filter"])
def test_a_budget_counts_what_came_in_vain(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, usage: dict, told: str, asked: int
) -> None:
    server.replies[:] = [raw(json.loads(chat("", ending).body) | usage)]
    assert told in stopped(capsys, server.url, tmp_path, *SAMPLES, budget=3 * sum(TOKENS))
    assert len(server.asked) == asked
    assert ledger(tmp_path)["input_tokens"] == (0 if usage else asked * TOKENS[0])


@pytest.mark.parametrize("drip", [0.0, 0.02])
def test_a_slow_answer_is_a_timeout(server: Served, tmp_path: Path, drip: float) -> None:
    server.dwell = 0.0 if drip else 3.0
    server.replies[:] = [replace(GOOD, drip=drip)]  # whole after five seconds
    with pytest.raises(Unusable, match="timeout"):
        ask(server.url, tmp_path, timeout=1.0, attempts=1)


@pytest.mark.parametrize(
    "models", [status(403), status(404), status(500), raw(b"<html>", "text/html"), raw(b"{"), raw(None)]
)
def test_an_endpoint_that_does_not_list_its_models_is_used(server: Served, tmp_path: Path, models: Reply) -> None:
    server.models = models
    assert ask(server.url, tmp_path)[0].verdict == 1


@pytest.mark.parametrize("code", [401, 404])
@pytest.mark.parametrize("askers", [1, 8])
def test_a_refused_key_or_model_ends_in_one_line(server: Served, tmp_path: Path, code: int, askers: int) -> None:
    server.replies[:] = [status(code, f"told to fail, and to repeat {KEY}")]
    program = f"import asking as t; t.ask({server.url!r}, t.Path({str(tmp_path)!r}), *t.SAMPLES[:{askers}])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout and ended.stderr.count("\n") == 1, ended.stderr
    assert server.url in ended.stderr and ("--model" if code == 404 else "--api-key-env") in ended.stderr
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"CREATE TABLE" in kept and KEY.encode() not in kept + ended.stderr.encode()


@pytest.mark.parametrize(("url", "remedy"), [("", "--api-key-env"), ("http://127.0.0.1:1/v1", "--base-url")])
def test_a_wrong_key_or_address_shows_before_the_work(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, remedy: str
) -> None:
    server.models = status(401, f"told to fail, and to repeat {KEY}")
    with pytest.raises(SystemExit) as end:
        ask(url or server.url, tmp_path, wait=None)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and not server.asked and KEY not in line
    assert (url or server.url) in line and remedy in line


def test_offline_no_key_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "你的密钥")
    assert ask("", tmp_path, offline=True)[0].verdict in (0, 1)


@pytest.mark.parametrize("code", [502, 503])
def test_a_server_that_loads_its_model_is_waited_for_and_costs_no_attempt(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    server.replies[:] = [status(code, "Loading model")] * 9 + [GOOD]
    assert ask(server.url, tmp_path, wait=600, attempts=1)[0].verdict == 1
    assert capsys.readouterr().err == f"agents: HTTP {code}: waiting 600 s for {server.url} (Loading model)\n"
    # Not longer than --wait; and once it has answered, it is the question that fails.
    server.replies[:] = [status(code, "Loading model")]
    assert "come back within --wait 60 s" in stopped(capsys, server.url, tmp_path, {"sample": 1}, wait=60, attempts=1)
    server.replies[:] = [GOOD, status(code, "Loading model")]
    server.asked.clear()
    answers = ask_on(server.url, tmp_path, *SAMPLES[2:4], wait=600, attempts=2)
    assert (answers[0].verdict, str(answers[1]), len(server.asked)) == (1, f"HTTP {code}", 3)


def test_an_endpoint_that_is_still_to_start_is_waited_for_where_wait_is_given(server: Served, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def asking() -> Verdict:
        args = settings(f"http://127.0.0.1:{port}/v1", run=tmp_path, wait=1e6, attempts=1)
        async with Client(args, "03") as client:
            question = asyncio.ensure_future(client.ask("detector", Verdict, **SLOTS))
            while not client.reasons_told and not question.done():
                await asyncio.sleep(1)
            with endpoint(GOOD, port=port):
                return await question

    assert asyncio.run(asking()).verdict == 1 and ledger(tmp_path)["outcomes"] == {"ok": 1}


def test_an_answer_that_was_on_its_way_does_not_end_the_wait_of_others(server: Served, tmp_path: Path) -> None:
    listed, replies = server.models, {0: replace(GOOD, drip=0.002), 1: status(503, "Loading model")}
    server.replies[:] = [lambda request: replies[request["seed"]]]

    async def asking() -> list[Verdict]:
        async with Client(settings(server.url, run=tmp_path, wait=900), "03") as client:
            await client.connect()
            server.models = Reply(drop=0)
            on_its_way, waiting = (
                asyncio.ensure_future(client.ask("detector", Verdict, sample=sample, **SLOTS)) for sample in replies
            )
            first = await on_its_way
            await asyncio.wait([waiting], timeout=0.2)
            server.models, replies[1] = listed, GOOD
            return [first, await waiting]

    assert [verdict.verdict for verdict in asyncio.run(asking())] == [1, 1]


def test_a_refused_key_is_what_is_heard_whatever_else_failed(server: Served, tmp_path: Path) -> None:
    """The first question brings nothing usable, the third that the key is refused."""
    replies = {0: status(400), 1: GOOD, 2: status(401)}
    server.replies[:] = [lambda request: replies[request["seed"]]]

    async def asking() -> None:
        async with Client(settings(server.url, run=tmp_path), "03") as client:
            questions = (client.ask("detector", Verdict, sample=sample, **SLOTS) for sample in replies)
            await gather_or_unusable(*questions)

    with pytest.raises(SystemExit) as end:
        asyncio.run(asking())
    assert end.value.code == 2


def test_slow_answers_show_a_bar_and_quick_ones_do_not(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    async def answer(number: int) -> int:
        for _ in range(9 * number):
            await asyncio.sleep(0)  # a turn of the loop
        return number

    monkeypatch.setattr(run_folder, "SLOW", -1.0)
    assert asyncio.run(gather_or_unusable(*map(answer, range(4)))) == [0, 1, 2, 3]
    assert "answers:" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "SLOW", 9.0)
    with slow_bar(2, "texts", "text") as count:
        count()
        tqdm.write("a line beside it", file=sys.stderr)
        count()
    assert capsys.readouterr().err == "a line beside it\n"
