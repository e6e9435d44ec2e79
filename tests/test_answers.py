"""Answers are read strictly: what does not fit the schema is no answer, and a grade is read from the logprobs."""

import json
from pathlib import Path

import pytest
from asking import GOOD, ask, judge, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Reply, Served, chat, raw, spelled

from common.answers import Verdict
from common.failures import NOT_JSON, Unusable

NO_VERDICT = [
    "判 1", '{"verdict": 1}', '{"reason": "好", "verdict": ', '{"reason": "好", "verdict": 2}', "[]", "1",
    '{"reason": "好", "verdict": 0, "verdict": 1}', '{"reason": "好", "verdict": 0}{"reason": "好", "verdict": 1}',
    '{"reason": ' + "[" * 20000 + "]" * 20000 + ', "verdict": 1}', '{"reason": "好", "verdict": true}',
    '{"reason": "好", "verdict": "1"}', '{"reason": "好", "verdict": null}', '{"reason": "好", "verdict": 1, "x": 1}',
]  # fmt: skip  # fmt: skip


@pytest.mark.parametrize("text", NO_VERDICT)
def test_what_is_not_the_json_asked_for_is_no_verdict(server: Served, tmp_path: Path, text: str) -> None:
    server.replies[:] = [chat(text)]
    with pytest.raises(Unusable, match=NOT_JSON):
        ask(server.url, tmp_path)
    assert len(server.asked) == 3 and ledger(tmp_path)["outcomes"] == {NOT_JSON: 3}


@pytest.mark.parametrize("body", [b"<html>", b'{"choices": [', b"", b"null", chat([{"text": "1"}]).body])
def test_a_success_that_is_no_chat_completion_is_unusable(server: Served, tmp_path: Path, body: bytes) -> None:
    server.replies[:] = [raw(body, "text/html" if body == b"<html>" else "application/json")]
    with pytest.raises(Unusable):
        ask(server.url, tmp_path)
    assert ledger(tmp_path)["retries"] == len(server.asked) <= 5


def test_a_fenced_answer_is_taken_and_a_malformed_one_asked_again(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [chat("好的！"), chat('```json\n{"reason": "好", "verdict": 0}\n```\n')]
    assert ask(server.url, tmp_path)[0].model_dump() == {"reason": "好", "verdict": 0}
    assert len({request["seed"] for request in server.asked}) == 2


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('看过了。\n\n```json\n{"reason": "好", "verdict": 0}\n```\n以上。', 0),
        ('```\n{"reason": "好", "verdict": 1}\n```', 1),
        ('```json\n{"reason": "好", "verdict": 0}\n```\n或者\n```json\n{"reason": "好", "verdict": 1}\n```', None),
        ('原文写着 {"reason": "好", "verdict": 1}，不可信。', None),
    ],
)  # fmt: skip
def test_json_fenced_in_prose_is_taken_where_there_is_one(
    server: Served, tmp_path: Path, text: str, verdict: int | None
) -> None:
    server.replies[:] = [chat(text)]
    if verdict is None:
        with pytest.raises(Unusable, match=NOT_JSON):
            ask(server.url, tmp_path)
    else:
        assert ask(server.url, tmp_path)[0].verdict == verdict


HEAD = (b'{"reason": "', "好".encode()[:2], "好".encode()[2:], b'", "')
DIGIT = {"1": 0.6, "0": 0.2, "2": 0.1}


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        (spelled(*HEAD, b'verdict": ', b"1", b"}", at5=DIGIT), 0.75),
        (spelled(*HEAD, b'verdict": ', b"0", b"}", at5=DIGIT), 0.75),  # sampled against the odds
        (spelled(*HEAD, b'verdict":', b" 1}", at5={" 1}": 0.3, " 1": 0.3, " 0}": 0.1, "0": 0.1}), 0.75),
        (spelled(*HEAD, b"verd", b'ict": 1', b"}", at5={'ict": 1': 0.9, 'ict": 0': 0.1}), 0.9),
        (spelled(*HEAD, b'verdict": ', b"1", b"}", at5={"1": 0.6, "2": 0.2}), 0.75),  # 0 is not listed: the rest
        (spelled(*HEAD, b'verdict": ', b"0", b"}", at5={"0": 0.75}), 0.25),
        (spelled(b'{"reason": "\\"verdict\\": 0, ', *HEAD[1:], b'verdict": ', b"1", b"}", at5=DIGIT), 0.75),
        (spelled(b"```json\n", *HEAD, b'verdict"\n:\n', b"1", b"}\n```", at6=DIGIT), 0.75),
    ],
    ids=["plain", "against", "spaced", "split", "unlisted", "zero", "quoted", "fenced"],
)  # fmt: skip
def test_a_grade_is_the_probability_of_the_verdict(server: Served, tmp_path: Path, reply: Reply, grade: float) -> None:
    server.replies[:] = [reply]
    for _ in range(2):  # the second from the cache
        (verdict,) = judge(server.url, tmp_path, graded=True)
        assert verdict.reward == verdict.grade == pytest.approx(grade)
        assert (
            verdict.verdict
            == json.loads(json.loads(reply.body)["choices"][0]["message"]["content"].strip("`json\n"))["verdict"]
        )
    (request,) = server.asked
    assert request["logprobs"] is True and request["top_logprobs"] == 20
    assert request["response_format"]["json_schema"]["schema"] == Verdict.model_json_schema()


def without(**changed: object) -> Reply:
    """A verdict whose last but one token has other logprobs than it should."""
    body = json.loads(spelled(*HEAD, b'verdict": ', b"1", b"}", at5=DIGIT).body)
    body["choices"][0]["logprobs"]["content"][5] |= changed
    return raw(body)


@pytest.mark.parametrize(
    "reply",
    [
        GOOD, chat('{"reason": "好", "verdict": 1}', logprobs={"content": None}),
        chat('{"reason": "好", "verdict": 1}', logprobs={"content": []}), without(logprob="?"),
        chat('{"reason": "好", "verdict": 1}', logprobs={"content": [{"token": '"verdict": 0', "logprob": -0.1}]}),
        without(top_logprobs=[{"token": "1", "logprob": float("nan")}], logprob=float("nan")),
        without(top_logprobs=[{"token": "1"}]), without(bytes=[999]),
    ],
)  # fmt: skip
def test_a_verdict_without_logprobs_is_no_grade(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply
) -> None:
    server.replies[:] = [reply]
    found = judge(server.url, tmp_path, 3, graded=True)
    assert [str(one) for one in found] == ["no logprobs of the verdict"] * 3 and len(server.asked) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "--graded" in line
    assert ledger(tmp_path)["outcomes"] == {"no logprobs of the verdict": 3}


def test_graded_and_ungraded_answers_are_kept_apart(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [spelled(*HEAD, b'verdict": ', b"1", b"}", at5=DIGIT)]
    for _ in range(2):
        (plain,) = judge(server.url, tmp_path)
        (graded,) = judge(server.url, tmp_path, graded=True)
        assert type(plain) is Verdict and plain.reward == 1.0 and graded.reward == pytest.approx(0.75)
    assert ["logprobs" in request for request in server.asked] == [False, True]
    server.replies[:] = [chat('{"reason": "好", "verdict": 1, "grade": 0.9}')]  # a grade is nothing a model may claim
    assert "not the JSON" in str(judge(server.url, tmp_path, graded=True, seed=7)[0])


def test_the_rule_based_critic_gives_no_grades(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        judge("", tmp_path, graded=True, offline=True)
    assert end.value.code == 2 and "--graded" in capsys.readouterr().err
