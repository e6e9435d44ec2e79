"""The client: a failed answer is no answer, the rest is asked again, and what stops the run does so in one line."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from asking import GOOD, KEY, SAMPLES, SLOTS, ask, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Reply, Served, chat, raw, settings, status

from common.answers import Verdict
from common.client import Client, gather_or_unusable
from common.failures import Unusable
from common.run_folder import ROOT


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (status(500), "HTTP 500", 5), (status(429), "rate limit", 5), (Reply(drop=0), "connection", 5),
        (replace(GOOD, drop=9), "connection", 5),
        (status(400), "HTTP 400", 1), (raw({"error": {"message": "busy"}}), "no choice", 3),
        (chat(""), "empty", 3), (chat(None), "empty", 3), (chat(None, refusal="不行"), "refusal", 3),
        (chat('{"reason": "好", "verdict": 1}', "length"), "cut at the token limit", 2),
        (chat('{"reason": "好", "verdict": 1}', "content_filter"), "content filter", 1),
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
    ("last", "reason"), [(status(400), "HTTP 400"), (chat(""), "empty"), (chat("", "content_filter"), "content filter")]
)
def test_a_question_that_fails_in_several_ways_comes_to_an_end(
    server: Served, tmp_path: Path, last: Reply, reason: str
) -> None:
    """What is worth fewer attempts than were made already is not asked again."""
    server.replies[:] = [status(500), status(500), status(500), last]
    with pytest.raises(Unusable, match=reason):
        ask(server.url, tmp_path)
    assert len(server.asked) == 4


NO_FORMAT = status(400, "This response_format type is unavailable now")


def test_an_endpoint_that_refuses_schemas_is_asked_without(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[:] = [lambda request: NO_FORMAT if "response_format" in request else GOOD]
    assert [v.verdict for v in ask(server.url, tmp_path, *SAMPLES, concurrency=1, attempts=1)] == [1] * 12
    assert len(server.asked) == 13  # it is told once
    assert capsys.readouterr().err.count("takes no schema: asking without one from now on") == 1
    assert ledger(tmp_path)["outcomes"] == {"ok": 12, "takes no schema": 1}
    server.replies[:] = [GOOD]
    assert ask(server.url, tmp_path, *SAMPLES)[0].verdict == 1 and len(server.asked) == 13  # from what was paid for


def test_a_refusal_of_schemas_where_none_was_sent_is_the_end(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [NO_FORMAT]
    with pytest.raises(Unusable):
        ask(server.url, tmp_path)
    assert len(server.asked) == 2


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

    assert [str(e) for e in asyncio.run(twice())] == ["HTTP 400"] * 2 and len(server.asked) == 1


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


@pytest.mark.parametrize("drip", [0.0, 0.02])
def test_a_slow_answer_is_a_timeout(server: Served, tmp_path: Path, drip: float) -> None:
    server.dwell = 0.0 if drip else 3.0
    server.replies[:] = [replace(GOOD, drip=drip)]  # whole after five seconds
    with pytest.raises(Unusable, match="timeout"):
        ask(server.url, tmp_path, timeout=1.0, attempts=1)


@pytest.mark.parametrize("models", [status(404), status(500), raw(b"<html>", "text/html"), raw(b"{"), raw(None)])
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
        ask(url or server.url, tmp_path)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and not server.asked and KEY not in line
    assert (url or server.url) in line and remedy in line


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
