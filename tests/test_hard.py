"""Step 2 with --hard: what GRPO has found in the reward model comes back as pairs."""

import argparse
import asyncio
import importlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script
from endpoint import chat, critic, endpoint, settings, status

from common import hard
from common.greetings import Policy
from common.offline.tiny_model import tiny_policy
from common.pairs import split_pairs
from common.prompts import PROMPTS, conversation
from common.records import Preference, Reference, read, write
from common.reward_model import RewardModel
from common.run_folder import file_hash
from common.store import Store

rm = importlib.import_module("02_train_rm")
SCRIPT, SMALL = "02_train_rm.py", ["--epochs", 1, "--checks", 2, "--stress-size", 10]
HOLE = "，锦鲤附体步步高"  # what the rubric of these tests dislikes, wherever it stands


def pair(query: str, chosen: str, rejected: str) -> Preference:
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Preference(prompt=conversation(query, PROMPTS), query=query, chosen=good, rejected=bad)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of step 2, and rollouts: for each query its greeting and others, some with the HOLE."""
    run = tmp_path_factory.mktemp("hard") / "run"
    references = {row.query: row.response for row in read(ROOT / "data/references.jsonl", Reference)[:160]}
    write(run / "preferences.jsonl", [pair(q, text, text[: len(text) // 3] + "了") for q, text in references.items()])
    done = run_script(SCRIPT, "--offline", "--run", run, *SMALL)
    assert done.returncode == 0, done.stderr
    model, rng, rows = RewardModel(run / "rm", str(tiny_policy()), PROMPTS), random.Random(0), []
    for step, (query, own) in enumerate(references.items()):
        others = rng.sample(sorted(references.values()), 3)
        for text, quality in [(own, 2.5), (own + HOLE, 1.0), *((other + HOLE, 1.0) for other in others)]:
            rows.append({"step": step // 16, "query": query, "response": text, "reason": "", "quality": quality})
    scores = model.score([(row["query"], row["response"]) for row in rows])
    write(run / "graded.jsonl", [row | {"reward": score} for row, score in zip(rows, scores, strict=True)])
    ungraded = [
        {name: value for name, value in row.items() if name != "quality"} for row in lines(run / "graded.jsonl")
    ]
    write(run / "rollouts_rm.jsonl", ungraded)
    return run


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs step 2 with these flags in this process; returns its exit code."""

    def call(folder: Path, *flags: object) -> int:
        rm.run_folder._locks.clear()  # as the end of a process does
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--offline", "--run", *map(str, [folder, *SMALL, *flags])])
        try:
            return rm.main(rm.parse_args())
        except SystemExit as stopped:
            return stopped.code

    return call


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    usual = {"run": folder, "prompts": PROMPTS, "seed": 0, "preferences": folder / "preferences.jsonl"}
    usual |= {"eval_preferences": None, "eval_share": 0.2, "allow_leak": False}
    return argparse.Namespace(**usual | changed)


def rollout(query: str, response: str, reward: float, quality: float | None = None) -> dict:
    return {"query": query, "response": response, "reward": reward, "quality": quality}


# ---- the pairs ------------------------------------------------------------------------------------------------------


def test_the_rubric_is_asked_about_the_highest_and_two_others_of_the_queries_with_the_highest_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [rollout("妈妈生日", f"第{n}条", n / 10) for n in range(9)]
    rows += [rollout("爸爸生日", f"第{n}条", 1 + n) for n in (0, 1, 1)]
    rows += [rollout("老师生日", "只此一条", 9), rollout("同学生日", "甲", 9), rollout("同学生日", "乙", 8)]
    barred = [pair("同学生日", "甲", "乙")]
    groups = hard.groups_to_grade(arguments(tmp_path), rows, barred)
    assert [[row["reward"] for row in group] for group in groups] == [[2, 1], [0.8, 0.7, 0.3, 0.0]]
    monkeypatch.setattr(hard, "QUERIES", 1)
    assert len(hard.groups_to_grade(arguments(tmp_path), rows, barred)) == 1


def test_the_liked_and_worse_are_rejected_against_the_best_by_the_rubric(tmp_path: Path) -> None:
    group = [rollout("妈妈生日", "抄题", 3, 1.0), rollout("妈妈生日", "尚可", 2, 2.0)]
    group += [rollout("妈妈生日", "最好", 1, 2.4), rollout("妈妈生日", "最差", 0, 1.0)]
    even = [rollout("爸爸生日", "甲", 3, 2.0), rollout("爸爸生日", "乙", 2, 2.0), rollout("爸爸生日", "丙", 1, None)]
    pairs = hard.pairs_of(arguments(tmp_path), [group, even], [pair("别的", "不相干的文本", "也不相干的东西")])
    prompt = conversation("妈妈生日", PROMPTS)[-1]["content"]
    assert [one.texts for one in pairs] == [(prompt, "最好", "抄题"), (prompt, "最好", "尚可")]
    assert not hard.pairs_of(arguments(tmp_path), [group], [pair("别的", "最好", "也不相干")])  # a text of the test


def test_only_what_has_no_grade_is_asked_for_and_booked_to_step_2(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    good = "妈妈，愿您今天少忙一点，面条趁热吃，我周末就回来看您。"
    groups = [
        [rollout("妈妈生日祝福", good, 1.0), rollout("妈妈生日祝福", "妈妈生日祝福", 2.0), rollout("妈", "愿", 0, 1.7)]
    ]
    with endpoint(critic) as served:
        asyncio.run(hard.grade(settings(served.url, run=tmp_path), groups, failures := Counter()))
    best, echo, given = (row["quality"] for row in groups[0])
    assert not failures and len(served.asked) == 2 and best > echo >= 1.0 and given == 1.7
    assert Store(tmp_path / "answers.sqlite", "02").ledger("rubric")["outcomes"] == {"ok": 2}


def test_an_answer_that_does_not_come_costs_its_text_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    groups = [[rollout("妈妈生日祝福", f"妈妈，第{n}次祝您生日快乐。", n) for n in range(2)]]
    with endpoint(chat("这不是 JSON"), critic) as served:
        args = settings(served.url, run=tmp_path, attempts=1, concurrency=1)
        asyncio.run(hard.grade(args, groups, failures := Counter()))
    assert failures.total() == 1 and sum(row["quality"] is None for row in groups[0]) == 1


# ---- training goes on -----------------------------------------------------------------------------------------------


def test_training_goes_on_from_the_checkpoint_and_closes_the_hole(folder: Path, step: Callable, capsys) -> None:
    adapter = folder / "rm/adapter_model.safetensors"
    started_from, tests_before = file_hash(adapter), json.loads((folder / "02_summary.json").read_text())["eval"]
    assert Policy("a", "b", folder / "policy_rm").trained_on == ["reward_model"]
    assert step(folder, "--hard", folder / "graded.jsonl") == 0
    assert file_hash(folder / hard.BEFORE / adapter.name) == started_from != file_hash(adapter)

    pairs = read(folder / "hard_pairs.jsonl", Preference)
    split = split_pairs(arguments(folder))
    barred = {one.texts[0] for one in split.test + split.stop}
    for one in pairs:
        _, chosen, rejected = one.texts
        assert HOLE not in chosen and rejected.endswith(HOLE) and one.texts[0] not in barred
    summary = json.loads((folder / "02_summary.json").read_text())
    figures = summary["hard"]
    assert figures["pairs"] == len(pairs) and figures["failures"] == {} and figures["graded"] <= 4 * figures["queries"]
    held_out, _ = hard.divide(arguments(folder), pairs, "rollouts", 0.2)
    assert figures["before"]["rollouts"]["n"] == figures["after"]["rollouts"]["n"] == len(held_out) > 0
    assert figures["after"]["rollouts"]["value"] > max(0.7, figures["before"]["rollouts"]["value"])
    assert figures["after"]["eval"] == summary["eval"] != tests_before == figures["before"]["eval"]
    assert summary["ledger"]["calls"] == 0 and summary["train_pairs"] == len(split.train)

    # The calibration is of the new weights: the score of chosen texts that it was fitted on has the unit again.
    texts = [(one.query, text) for one in split.stop for text in one.texts[1:]]
    scores = RewardModel(folder / "rm", str(tiny_policy()), PROMPTS).score(texts)
    assert abs(sum(scores) / len(scores)) < 1e-3
    # Step 5: the rubric has become a teacher of the policy of this reward model.
    assert Policy("a", "b", folder / "policy_rm").trained_on == ["reward_model", "rubric"]
    assert Policy("a", "b", folder / "policy_judge").trained_on == ["judge"]

    capsys.readouterr()
    assert step(folder, "--hard", folder / "graded.jsonl") == 0 and "done already" in capsys.readouterr().out
    # As if it had been killed before the end: it starts from what there was before, and comes to the same weights.
    after = file_hash(adapter)
    stage = folder / "stages/02_hard.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"done": False}))
    assert step(folder, "--hard", folder / "graded.jsonl") == 0 and file_hash(adapter) == after
    again = json.loads((folder / "02_summary.json").read_text())
    assert again["hard"] == figures and again["eval"] == summary["eval"]
    # Another round asks for --redo, and for rollouts that were rewarded by these weights.
    other = folder / "other.jsonl"
    write(other, [row | {"reward": row["reward"] + 1} for row in lines(folder / "graded.jsonl")])
    assert step(folder, "--hard", other) == 2 and "add --redo" in capsys.readouterr().err
    assert step(folder, "--hard", other, "--redo") == 2 and "another model did" in capsys.readouterr().err
    assert file_hash(adapter) == after


# ---- what is wrong is said in one line -------------------------------------------------------------------------------


def error(capsys) -> str:
    """The one line that was said; what a library says of its progress is none."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize("fault", ["empty", "other", "alone", "judge", "missing"])
def test_rollouts_that_cannot_be_used_change_nothing(folder: Path, step: Callable, fault: str, capsys) -> None:
    rows, file = lines(folder / "graded.jsonl"), folder / "changed.jsonl"
    if fault == "other":  # another reward model, as of another base
        rows = [row | {"reward": -row["reward"] + 0.5} for row in rows]
    if fault == "alone":
        rows = list({row["query"]: row for row in rows}.values())
    if fault == "judge":
        rows = [row | {"reward": float(n % 2)} for n, row in enumerate(rows)]
    if fault != "missing":
        write(file, [] if fault == "empty" else rows)
    before = file_hash(folder / "rm")
    assert step(folder, "--hard", file) == 2
    said = {
        "empty": "is empty; make it with: python 04_grpo.py --reward rm", "missing": "does not exist; make it with",
        "alone": "with two that differ", "other": "another model did", "judge": "another model did",
    }  # fmt: skip
    assert said[fault] in error(capsys) and file_hash(folder / "rm") == before
    assert not (folder / "hard_pairs.jsonl").exists()


def test_a_reward_model_that_is_not_finished_cannot_go_on(folder: Path, step: Callable, capsys) -> None:
    (folder / "02_summary.json").unlink()
    assert step(folder, "--hard", folder / "graded.jsonl") == 2
    assert "goes on from a reward model that is finished" in error(capsys)


@pytest.mark.parametrize("reply", ["filtered", "500"])
def test_no_answer_of_the_rubric_is_one_line(folder: Path, monkeypatch, reply: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hard, "QUERIES", 1)  # fewer questions than let the client end the run by itself
    args = arguments(folder, hard=[folder / "rollouts_rm.jsonl"], redo=False)
    with endpoint(status(500) if reply == "500" else chat("", "content_filter")) as served:
        args = argparse.Namespace(**vars(settings(served.url, run=folder, attempts=1)) | vars(args))
        with pytest.raises(SystemExit) as stopped:
            hard.begin(args, str(tiny_policy()), split_pairs(args), {})
    assert stopped.value.code == 3 and not (folder / "hard_pairs.jsonl").exists()


def test_the_rollouts_of_a_run_come_back(run: Path, tmp_path: Path) -> None:
    """As a user does it: the critic grades what the policy of an --offline run has written."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    done = run_script(SCRIPT, "--offline", "--run", folder, *SMALL[2:], "--hard", folder / "rollouts_rm.jsonl")
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "02_summary.json").read_text())
    # What step 5 has asked about these rollouts costs nothing again.
    assert figures["ledger"]["calls"] <= figures["hard"]["graded"] > 0 and not figures["hard"]["failures"]
    for one in read(folder / "hard_pairs.jsonl", Preference):
        assert one.why == "rollouts" and one.texts[1] != one.texts[2]
