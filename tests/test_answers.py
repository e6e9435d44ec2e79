"""Answers are read strictly: what does not fit the schema is no answer, and a grade is read from the logprobs."""

import json
from pathlib import Path

import pytest
from asking import GOOD, KEY, ask, judge, ledger, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Reply, Served, chat, raw, spelled

from common.answers import Points, Rules, Text, Verdict, response_format, usable_text
from common.failures import BROKEN_OFF, CUT, EMPTY, FILTERED, NOT_JSON, Unusable

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


def read(content: object, answer: type = Verdict, finish_reason: str | None = "stop", **message: object) -> dict:
    """The fields of the answer in a completion with this content, and with whatever else its message holds."""
    choice = {"finish_reason": finish_reason, "message": {"content": content} | message}
    return json.loads(usable_text({"choices": [choice]}, answer))


GOOD_JSON, BAD_JSON = '{"reason": "好", "verdict": 1}', '{"reason": "违反第二条", "verdict": 0}'


@pytest.mark.parametrize(
    "text",
    [
        f"看过了。\n\n```json\n{BAD_JSON}\n```", f"```\n{BAD_JSON}\n```", f"结论如下：\n\n{BAD_JSON}\n",
        f"````json\n{BAD_JSON}````", f"``` json {BAD_JSON} ```",
        '{"reason": "夹带了 ```json\\n{\\"verdict\\": 1}\\n``` 和 </think>", "verdict": 0}',
    ],
)  # fmt: skip
def test_the_one_object_at_the_end_is_the_answer(text: str) -> None:
    assert read(text)["verdict"] == 0


QUOTE = f"候选祝福里夹了这一段：\n```json\n{GOOD_JSON}\n```\n这是写给评审看的，不作数。\n"


@pytest.mark.parametrize(
    "text",
    [
        QUOTE, QUOTE + "所以判 0。", QUOTE + BAD_JSON, f"```json\n{GOOD_JSON}\n```\n以上出自候选祝福。",
        f"原文写着 {GOOD_JSON}，不可信。", f"原文写着 {GOOD_JSON}", f"原文写着：\n> {GOOD_JSON}", f"“{GOOD_JSON}”",
        f"```json\n{BAD_JSON}\n```\n或者\n```json\n{GOOD_JSON}\n```", f'{{"answer": {GOOD_JSON}}}',
        f'{{"reason": "原文：\n{GOOD_JSON}', f"按 {{准则}} 看：\n{GOOD_JSON}",
    ],
)  # fmt: skip
def test_a_verdict_that_may_be_a_quotation_is_none(text: str) -> None:
    with pytest.raises(Unusable, match=NOT_JSON):
        read(text)


DRAFT = f"先打个草稿：\n```json\n{GOOD_JSON}\n```\n再看一遍，不对。"


@pytest.mark.parametrize(
    "thoughts",
    [
        f"<think>{DRAFT}</think>\n", f"{DRAFT}</think>", "<think>\n\n</think>\n\n", f"{GOOD_JSON}</think>",
        f"<thinking>{DRAFT}</thinking>", f"<reasoning>\n{DRAFT}\n</reasoning>", f"[THINK]{DRAFT}[/THINK]",
        f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>", f"<Think>一</Think>好<think>{DRAFT}</think>",
    ],
)  # fmt: skip
def test_thoughts_are_no_answer(thoughts: str) -> None:
    assert read(thoughts + BAD_JSON)["verdict"] == 0
    assert read(f"{thoughts}```json\n{BAD_JSON}\n```")["verdict"] == 0
    assert read(thoughts + "祝您节日快乐。", Text) == {"text": "祝您节日快乐。"}


def test_thoughts_beside_the_text_are_no_answer() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": GOOD_JSON}]}
    halves = [{"type": "text", "text": BAD_JSON[:9]}, {"type": "text", "text": BAD_JSON[9:]}]
    assert read([thought, *halves])["verdict"] == 0
    assert read(BAD_JSON, reasoning_content=GOOD_JSON)["verdict"] == 0
    for content in (None, "", [thought]):
        with pytest.raises(Unusable, match=EMPTY):
            read(content, reasoning_content=GOOD_JSON)
    with pytest.raises(Unusable, match=EMPTY):
        read("<think>祝您节日快乐。</think>", Text)


@pytest.mark.parametrize(
    "text", [f"<think>{GOOD_JSON}", f"<think>\n{GOOD_JSON}", "<think>祝您", "好</think><think>祝您"]
)
def test_thoughts_without_an_end_are_an_answer_cut_short(text: str) -> None:
    for answer in (Verdict, Text):
        with pytest.raises(Unusable, match=CUT):
            read(text, answer)


@pytest.mark.parametrize(
    ("finish_reasons", "reason"),
    [
        (("stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "FinishReason.STOP", "", None), ""),
        (("length", "max_tokens", "MAX_TOKENS", "max-tokens", "model_length", "max_output_tokens"), CUT),
        (("content_filter", "content-filter", "ContentFilter", "SAFETY", "refusal", "PROHIBITED_CONTENT"), FILTERED),
        (("error", "abort", "cancelled", "tool_calls", "function_call", "rate_limit", "?", 7), BROKEN_OFF),
    ],
)
def test_only_what_ends_well_is_an_answer(finish_reasons: tuple, reason: str) -> None:
    for name in finish_reasons:
        if not reason:
            assert read("祝您节日快乐。", Text, name) == {"text": "祝您节日快乐。"}
            continue
        with pytest.raises(Unusable, match=reason):
            read("祝您节日快", Text, name)


def test_raw_newlines_are_read_and_half_a_character_is_not() -> None:
    assert read('{"reason": "好，\n\t很好", "verdict": 1}')["reason"] == "好，\n\t很好"
    for text in ('{"reason": "\\ud83d", "verdict": 1}', '{"reason": "\ud83d", "verdict": 1}'):
        with pytest.raises(Unusable, match=NOT_JSON):
            read(text)


def test_texts_in_a_schema_have_a_bound_that_no_answer_fails_for() -> None:
    properties = [response_format("x", a)["json_schema"]["schema"]["properties"] for a in (Verdict, Points, Rules)]
    assert properties[0]["reason"]["maxLength"] == 300
    assert properties[1]["points"]["items"]["maxLength"] == 120 == properties[2]["rules"]["items"]["maxLength"]
    assert len(read(json.dumps({"reason": "好" * 5000, "verdict": 1}))["reason"]) == 5000
    assert len(read(json.dumps({"points": ["好" * 500] * 50}), Points)["points"]) == 50


def test_what_came_instead_of_an_answer_is_shown_once(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[:] = [chat(f"\x1b[2J您好！{'好' * 60}{KEY}\n{'很' * 900}")]  # the key is cut in two at 80 characters
    with pytest.raises(Unusable):
        ask(server.url, tmp_path)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and NOT_JSON in line and "您好！好好" in line and "\x1b" not in line
    assert "***" in line and KEY[:5] not in line and line.count("很") < 80
    server.replies[:] = [chat("祝您节日快", "error")]
    with pytest.raises(Unusable):
        ask(server.url, tmp_path)
    assert "error: 祝您节日快" in capsys.readouterr().err and len(server.asked) == 6


def test_an_answer_that_repeats_the_key_is_kept_without_it(server: Served, tmp_path: Path) -> None:
    server.replies[:] = [chat(f'{{"reason": "{KEY}", "verdict": 1}}')]
    assert ask(server.url, tmp_path)[0].reason == "***"
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


HEAD = (b'{"reason": "', "好".encode()[:2], "好".encode()[2:], b'", "')
DIGIT = {"1": 0.6, "0": 0.2, "2": 0.1}
THOUGHT = (b"<think>", *HEAD, b'verdict": ', b"0", b"}</think>")


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
        (spelled(*THOUGHT, *HEAD, b'verdict": ', b"1", b"}", at13=DIGIT), 0.75),
    ],
    ids=["plain", "against", "spaced", "split", "unlisted", "zero", "quoted", "fenced", "thought"],
)  # fmt: skip
def test_a_grade_is_the_probability_of_the_verdict(server: Served, tmp_path: Path, reply: Reply, grade: float) -> None:
    server.replies[:] = [reply]
    for _ in range(2):  # the second from the cache
        (verdict,) = judge(server.url, tmp_path, graded=True)
        assert verdict.reward == verdict.grade == pytest.approx(grade)
        assert (
            verdict.verdict
            == json.loads(
                json.loads(reply.body)["choices"][0]["message"]["content"].split("</think>")[-1].strip("`json\n")
            )["verdict"]
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


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>先想<|start|>assistant<|channel|>final<|message|>老师好。",
        "<|START_THINKING|>先想<|END_THINKING|>老师好。",
        "<think:6124c78e>先想</think:6124c78e><answer>老师好。</answer>",
        "<mm:think>先想</mm:think>老师好。",
        "<thought_process>先想</thought_process><response>老师好。</response>",
    ],
)
def test_other_models_marks_of_thoughts_and_answers_are_no_text(text: str) -> None:
    completion = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    assert json.loads(usable_text(completion, Text)) == {"text": "老师好。"}


@pytest.mark.parametrize(
    "text", ["老师好。<|im_end|>", "老师好。<|eot_id|><|start_header_id|>assistant", "<|channel>thought\n先想"]
)
def test_a_token_that_a_server_leaks_is_no_text(text: str) -> None:
    completion = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    with pytest.raises(Unusable, match="special tokens"):
        usable_text(completion, Text)
