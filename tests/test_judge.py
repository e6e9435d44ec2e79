"""Step 3 as a subprocess against a loopback endpoint: a judge that never gets worse, whatever the agents say."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script
from endpoint import TOKENS, Reply, Served, chat, critic, data_of, endpoint, settings, spelled, status
from endpoint import role_of as role
from process import start_script

from common.client import Client
from common.judge import judge_greeting
from common.offline.tiny_model import tiny_policy
from common.prompts import read_rules
from common.records import Labelled, read, split_labelled

SCRIPT = "03_refine_judge.py"
SMALL = ["--rounds", "3", "--batch", "12", "--attacks", "6", "--bank", "13", "--patience", "3"]


@pytest.fixture
def server() -> Iterator[Served]:
    with endpoint(critic) as served:
        yield served


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """120 of the shipped labelled rows, whole pairs."""
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    rows = (ROOT / "data/labelled.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(rows[:240]), encoding="utf-8")
    return path


def command(run: Path, labelled: Path, url: str, *flags: object) -> list[str]:
    named = [SCRIPT, "--run", run, "--labelled", labelled, "--base-url", url, "--model", "m"]
    return list(map(str, [*named, *SMALL, "--concurrency", 8, "--attempts", 1, *flags]))


def refine(
    run: Path, labelled: Path, url: str, *flags: object, code: int = 0, told: str = ""
) -> tuple[list[dict], dict]:
    """(the versions, the summary) of a run that must end with this exit code, and say this on stdout."""
    done = run_script(*command(run, labelled, url, *flags))
    assert done.returncode == code and told in done.stdout, done.stdout + done.stderr
    return lines(run / "principles.jsonl"), json.loads((run / "03_summary.json").read_text(encoding="utf-8"))


def rules(*texts: str) -> Reply:
    return chat(json.dumps({"rules": list(texts)}, ensure_ascii=False))


def test_it_gets_better_and_what_it_did_is_on_record(server: Served, tmp_path: Path, labelled: Path) -> None:
    versions, summary = refine(tmp_path / "run", labelled, server.url, "--repeat", 1, "--attribute")
    seed, final = summary["test"]["seed"], summary["test"]["final"]
    # The seed principles already name what most attacks do.
    assert final["kappa"] > seed["kappa"] and final["false_accept"]["value"] <= seed["false_accept"]["value"]
    assert versions[0]["principles"] == read_rules(ROOT / "prompts/principles.md") and versions[0]["accepted"]
    accepted = [v["validation"]["kappa"] for v in versions if v["accepted"]]
    assert accepted == sorted(accepted) and len(accepted) > 1
    assert {row["without"] for row in summary["attribute"]} == set(summary["principles"])
    assert summary["same_when_asked_again"]["value"] == 1.0 == summary["same_in_reverse_order"]["value"]
    assert (tmp_path / "run/principles.svg").stat().st_size > 1000
    attacked = {row["query"] for row in lines(tmp_path / "run/redteam.jsonl") if row["source"] == "fixed"}
    unseen = {data_of(r["messages"])["query"] for r in server.asked if role(r) == "detector"} - attacked
    assert len(attacked) >= 12 and len(unseen) > 12


def test_tokens_are_those_of_the_answers_that_a_version_rests_on(
    server: Served, tmp_path: Path, labelled: Path
) -> None:
    versions, summary = refine(tmp_path / "run", labelled, server.url)
    rounds, so_far = ([v["tokens"][key] for v in versions] for key in ("round", "so_far"))
    assert [[sum(r[side] for r in rounds[: n + 1]) for side in (0, 1)] for n in range(len(rounds))] == so_far
    validation = split_labelled(read(labelled, Labelled), 0)["validation"]
    fixed = [row for row in lines(tmp_path / "run/redteam.jsonl") if row["source"] == "fixed"]
    judged = {(r.query, r.response) for r in validation} | {(r["query"], r["response"]) for r in fixed}
    assert rounds[0] == [len(judged) * tokens for tokens in TOKENS]
    assert len(versions) > 1 and rounds[1][0] > 0 and summary["tokens"] == so_far[-1]
    spent = [summary["ledger"][name] for name in ("input_tokens", "output_tokens")]
    test_part = 2 * (summary["test"]["final"]["n"] + summary["test"]["final"]["false_accept"]["n"])
    assert [s - t for s, t in zip(spent, so_far[-1], strict=True)] <= [test_part * tokens for tokens in TOKENS]


def test_attribution_and_repetition_are_added_without_a_new_round(
    server: Served, tmp_path: Path, labelled: Path
) -> None:
    run = tmp_path / "run"
    _, before = refine(run, labelled, server.url)
    files = [(run / name).read_bytes() for name in ("principles.jsonl", "redteam.jsonl")]
    server.asked.clear()
    _, after = refine(run, labelled, server.url, "--attribute", "--repeat", 1)
    assert {role(r) for r in server.asked} == {"detector"}
    assert [(run / name).read_bytes() for name in ("principles.jsonl", "redteam.jsonl")] == files
    assert after["test"] == before["test"] and after["failures"] == before["failures"]
    assert after["seconds"] >= before["seconds"]  # of both calls together
    assert {row["without"] for row in after["attribute"]} == set(before["principles"]) and not before["attribute"]
    assert after["same_when_asked_again"]["n"] and not before["same_when_asked_again"]["n"]
    server.asked.clear()
    assert refine(run, labelled, server.url, "--attribute", "--repeat", 1)[1] == after and not server.asked


def test_a_poisoned_rewrite_is_rolled_back(server: Served, tmp_path: Path, labelled: Path) -> None:
    """An Optimiser that drops every rule but one, which nothing breaks: everything would pass."""

    def poisoned(request: dict) -> Reply:
        lenient = role(request) == "optimiser" and data_of(request["messages"])["kind"] == "准则"
        return rules("写得开心就好。") if lenient else critic(request)

    seed = tmp_path / "principles.md"
    seed.write_text("- 必须写完整，话说到一半就中断的不合格。\n- 不夹杂外文或拼音。\n", encoding="utf-8")
    server.replies[:] = [poisoned]
    versions, summary = refine(tmp_path / "run", labelled, server.url, "--from", seed)
    assert [v["accepted"] for v in versions] == [True, False, False, False]
    assert all("would" in v["why"] for v in versions[1:]) and summary["principles"] == read_rules(seed)
    versions, _ = refine(tmp_path / "without", labelled, server.url, "--from", seed, "--no-acceptance")
    assert versions[1]["accepted"] and versions[1]["principles"] == ["写得开心就好。"]


def test_rules_that_quote_a_labelled_greeting_are_refused(server: Served, tmp_path: Path, labelled: Path) -> None:
    text = next(row["response"] for row in lines(labelled) if len(row["response"]) > 20)
    quoting = f"像“{text[2:14]}”这样的才合格。"

    def copying(request: dict) -> Reply:
        return rules(quoting, "不夹杂外文或拼音。") if role(request) == "optimiser" else critic(request)

    server.replies[:] = [copying]
    versions, summary = refine(tmp_path / "run", labelled, server.url)
    assert not any(quoting in v["principles"] for v in versions)
    assert summary["failures"]["a rule that quotes a labelled greeting"] >= 1


def test_nothing_is_decided_when_half_the_verdicts_fail(server: Served, tmp_path: Path, labelled: Path) -> None:
    def half(request: dict) -> Reply:
        broken = role(request) == "detector" and len(data_of(request["messages"])["response"]) % 2
        return status(400) if broken else critic(request)

    server.replies[:] = [half]
    versions, summary = refine(tmp_path / "run", labelled, server.url)
    assert len(versions) > 1 and not any(v["accepted"] for v in versions[1:])
    assert any("not decided" in v["why"] for v in versions[1:])
    assert summary["failures"]["HTTP 400"] > 10 and summary["test"]["final"]["failed"] > 10


TOO_LONG = status(400, "the prompt is too long: 5210 tokens, and the context holds 4096")
LESSON = chat(json.dumps({"lesson": "看清楚祝福写给谁，也看清楚是什么日子，" * 10}, ensure_ascii=False))


def test_an_optimiser_that_is_never_heard_is_no_rejected_rewrite(
    server: Served, tmp_path: Path, labelled: Path
) -> None:
    replies = {"optimiser": TOO_LONG, "reflector": LESSON}
    server.replies[:] = [lambda request: replies.get(role(request)) or critic(request)]
    lost = "3 of 3 rounds lack answers (the optimiser was not heard: HTTP 400); run again"
    versions, _ = refine(tmp_path / "run", labelled, server.url, "--patience", 2, code=3, told=lost)
    assert [v["why"] for v in versions[1:]] == ["the optimiser was not heard: HTTP 400"] * 3
    versions, _ = refine(tmp_path / "run", labelled, server.url, "--patience", 2, code=3, told=lost)
    server.replies[:] = [critic]  # the endpoint is mended: the rounds are played again
    versions, _ = refine(tmp_path / "run", labelled, server.url, "--patience", 2)
    assert any(v["accepted"] for v in versions[1:])


def test_feedback_that_is_too_long_is_shortened(server: Served, tmp_path: Path, labelled: Path) -> None:
    def small_context(request: dict) -> Reply:
        if role(request) == "optimiser" and max(map(len, data_of(request["messages"])["feedback"])) > 110:
            return TOO_LONG
        return LESSON if role(request) == "reflector" else critic(request)

    server.replies[:] = [small_context]
    versions, summary = refine(tmp_path / "run", labelled, server.url)
    assert summary["failures"]["HTTP 400"] and not any("heard" in v["why"] for v in versions)
    shown = [data_of(r["messages"])["feedback"] for r in server.asked if role(r) == "optimiser"]
    cut = json.loads(json.loads(LESSON.body)["choices"][0]["message"]["content"])["lesson"][:100] + "（"
    assert any(item.startswith(cut) for feedback in shown for item in feedback)


@pytest.mark.parametrize("silent", ["reflector", "detector"])
def test_feedback_that_never_came_is_no_rejected_rewrite(
    server: Served, tmp_path: Path, labelled: Path, silent: str
) -> None:
    heard = []

    def broken(request: dict) -> Reply:
        heard.append(role(request))
        failing = role(request) == silent and (silent == "reflector" or heard.count(silent) > 60)
        return status(400) if failing else critic(request)

    server.replies[:] = [broken]
    versions, _ = refine(tmp_path / "run", labelled, server.url, "--no-adversary", "--rounds", 2, code=3)
    assert versions[-1]["why"] == "one who gives feedback was not heard: HTTP 400"


def test_nobody_is_told_to_ask_again_what_will_be_refused_again(server: Served, tmp_path: Path, labelled: Path) -> None:
    refused = chat("", "content_filter")
    server.replies[:] = [lambda request: refused if role(request) == "optimiser" else critic(request)]
    versions, _ = refine(tmp_path / "run", labelled, server.url, told="another call would bring the same")
    assert versions[1]["why"] == "the optimiser was not heard: content filter"


def test_a_judge_that_always_says_yes_is_called_that(server: Served, tmp_path: Path, labelled: Path) -> None:
    yes = chat('{"reason": "好", "verdict": 1}')
    server.replies[:] = [lambda request: yes if role(request) == "detector" else critic(request)]
    _, summary = refine(tmp_path / "run", labelled, server.url)
    final = summary["test"]["final"]
    assert summary["constant"] and final["kappa"] == 0 and final["false_accept"]["value"] == 1.0


def test_a_grade_is_the_reward_of_step_4(server: Served, run: Path, tmp_path: Path) -> None:
    """GRPO for one step against an endpoint with logprobs: the reward is P(verdict = 1), not the verdict."""

    def graded(request: dict) -> Reply:
        good = b"1" if len(data_of(request["messages"])["response"]) % 2 else b"0"
        odds = {"1": 0.6, "0": 0.2} if good == b"1" else {"1": 0.1, "0": 0.9}
        return spelled(b'{"reason": "', "好".encode(), b'", "verdict": ', good, b"}", at3=odds)

    server.replies[:] = [lambda request: graded(request) if role(request) == "detector" else critic(request)]
    flags = ["--reward", "judge", "--graded", "--run", tmp_path / "run", "--queries", run.parent / "queries.jsonl"]
    flags += ["--policy", tiny_policy(), "--bits", 16, "--base-url", server.url, "--model", "m", "--steps", 1]
    flags += ["--queries-per-step", 4, "--mini-batch", 4, "--micro-batch", 16, "--max-tokens", 24]
    shutil.copytree(run / "policy_sft", tmp_path / "run/policy_sft")
    shutil.copy(run / "principles.jsonl", tmp_path / "run/principles.jsonl")
    done = run_script("04_grpo.py", *flags, NO_PROXY="127.0.0.1")
    assert done.returncode == 0, done.stderr
    rows = [row for row in lines(tmp_path / "run/rollouts_judge.jsonl") if row["response"].strip()]
    assert len(rows) > 8
    for row in rows:
        assert row["reward"] == pytest.approx(0.75 if len(row["response"]) % 2 else 0.1), row


def test_step_3_asked_again_books_nothing_of_step_4(server: Served, tmp_path: Path, labelled: Path) -> None:
    """The judge is the same role in both steps, and what it costs is booked to the step that asks."""
    run = tmp_path / "run"
    _, before = refine(run, labelled, server.url)

    async def step_4() -> None:
        async with Client(settings(server.url, run=run), "04_judge") as client:
            for n in range(50):
                await judge_greeting(client, "教师节", f"老师好{n}。", ["通顺"])

    asyncio.run(step_4())
    server.asked.clear()
    _, after = refine(run, labelled, server.url, "--attribute")
    assert after["ledger"]["calls"] == before["ledger"]["calls"] + len(server.asked)


@pytest.mark.parametrize(("flag", "silent"), [("--no-adversary", "generator"), ("--no-reflection", "reflector")])
def test_an_ablation_leaves_its_agent_out(
    server: Served, tmp_path: Path, labelled: Path, flag: str, silent: str
) -> None:
    refine(tmp_path / "run", labelled, server.url, flag)
    asked = {role(request) for request in server.asked}
    assert silent not in asked and "detector" in asked


def test_killed_it_goes_on_and_ends_with_the_same_file(server: Served, tmp_path: Path, labelled: Path) -> None:
    whole, _ = refine(tmp_path / "whole", labelled, server.url)
    asked, server.dwell = len(server.asked), 0.005
    for moment in (100, 300, 500):
        before = len(server.asked)
        process = start_script(*command(tmp_path / "killed", labelled, server.url))
        while len(server.asked) - asked < moment and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert len(server.asked) > before
    versions, summary = refine(tmp_path / "killed", labelled, server.url)
    assert versions == whole
    assert len(server.asked) - asked <= asked + 3 * 8 and summary["ledger"]["outcomes"].get("killed", 0) <= 3 * 8


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda rows: [row | {"label": 1} for row in rows], "both labels"),
        (lambda rows: rows[:40], "at least 30"),
        (lambda rows: [*rows[:5], rows[5] | {"label": 2}], ":6"),
    ],
)
def test_labels_that_cannot_decide_are_refused(
    server: Served, tmp_path: Path, labelled: Path, spoil, told: str
) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = [{k: v for k, v in row.items() if k != "id"} for row in lines(labelled)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in spoil(rows)), encoding="utf-8")
    done = run_script(*command(tmp_path / "run", path, server.url))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr and not server.asked
