"""Likelihood under a language model: its value, what it is worth, as a reward, to the watch, in step 5."""

import asyncio
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lines, run_script

from common.greetings import Policy
from common.likelihood import ANYBODY, APART, HELPED, LIKELY, LanguageModel, add_likelihoods, label_best, worth
from common.offline.tiny_model import tiny_policy
from common.prompts import PROMPTS, conversation
from common.records import Judgement, Query
from common.rewards import Rewards
from common.signs import signs
from common.watch import Watch

QUERY, GREETING = "给奶奶祝寿", "奶奶，愿您福寿安康，年年有今日，岁岁有今朝。"
ROWS = [(QUERY, GREETING), ("中秋快乐 朋友", "月圆人圆，愿你事事顺心。"), (QUERY, "好。"), (QUERY, "")]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(str(tiny_policy()), PROMPTS)


def test_a_score_is_the_mean_log_probability_of_the_text_and_the_end_of_its_turn(model: LanguageModel) -> None:
    """As one pass over the whole conversation has it, without padding and without leaving logits out."""
    tokenizer = model.tokenizer
    for (query, text), score in zip(ROWS, model.score(ROWS, batch_size=3), strict=True):
        prompt = tokenizer.apply_chat_template(conversation(query, PROMPTS), add_generation_prompt=True, tokenize=False)
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model.model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
        by_hand = [logits[len(asked) + place - 1, token].item() for place, token in enumerate(said)]
        assert score == pytest.approx(sum(by_hand) / len(said), abs=1e-4)
    assert model.score([]) == []


def test_what_is_likely_enough_and_has_something_of_its_query_is_worth_one() -> None:
    assert worth(LIKELY, LIKELY - HELPED) == worth(-0.1, -0.1 - HELPED) == worth(-0.1, -3.0) == 1
    assert worth(LIKELY - 1, -9.0) == pytest.approx(1 / math.e)
    assert worth(-0.1, 0.9 - HELPED) == pytest.approx(1 / math.e)  # likelier without its query, as a stock wish is
    assert worth(LIKELY - 1, LIKELY - HELPED) == pytest.approx(1 / math.e**2)
    assert worth(LIKELY - 0.01, -9.0) < 1 and worth(-0.1, -0.09 - HELPED) < 1
    assert math.isnan(worth(math.nan, -9.0)) and math.isnan(worth(-0.1, math.nan))


def test_what_is_spoilt_is_worth_nothing_and_never_scored(model: LanguageModel, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(model, "score", lambda rows, size: asked.extend(rows) or [-0.1, -0.1 - HELPED])
    spoilt = ["", f"{QUERY}：{GREETING}", f"好的，祝福语如下：{GREETING}", f"{GREETING}愿您"]
    assert model.worths([(QUERY, text) for text in (*spoilt[:2], GREETING, *spoilt[2:])]) == [0, 0, 1, 0, 0]
    assert asked == [(QUERY, GREETING), (ANYBODY, GREETING)]


def test_as_a_reward_it_says_of_what_is_worth_nothing_why() -> None:
    args = Namespace(reward="likelihood", likelihood=str(tiny_policy()), prompts=PROMPTS, micro_batch=2)
    rewards = Rewards(args, "")
    rewards.model.score = lambda rows, batch: [LIKELY - 1, math.nan, -9.0, -9.0]
    rows = [(QUERY, GREETING), (QUERY, f"{QUERY}！{GREETING}"), (QUERY, GREETING)]
    found = asyncio.run(rewards.rewards_for(rows))
    assert found[0] == (pytest.approx(1 / math.e), "") and found[1][0] == 0 and "echo" in found[1][1]
    assert found[2][0] is None  # no number is no reward


def test_the_watch_warns_where_a_rising_reward_makes_greetings_less_likely(tmp_path: Path, capsys) -> None:
    args = Namespace(seed=0, watch_queries=20, reward="rm", run=tmp_path, prompts=PROMPTS, watch_every=4)
    args.likelihood = str(tiny_policy())
    watch = Watch(args, [Query(query=f"问{n}") for n in range(20)])
    watch.write = lambda model, tokenizer: ["祝好。"] * 20
    watch.grade = lambda texts: asyncio.sleep(0, [2.0] * 20)
    noise = [0.4 * (number % 5) for number in range(20)]

    def look(step: int, level: float, rewards: list[float], reverse: bool = False) -> dict:
        scores = [level - one for one in (noise[::-1] if reverse else noise)]
        watch.language_model.score = lambda rows: scores
        return watch.look(None, None, step, rewards)

    assert look(0, -2.0, [])["less_likely"] is None
    assert not look(4, -2.0, [0.0, 1.0])["hack"]  # as likely as before
    assert not look(8, -3.0, [1.0, 0.0])["hack"]  # less likely, and so is the reward
    assert not look(12, -2.3, [0.0, 1.0], reverse=True)["hack"]  # -0.30, which is within noise
    assert not look(16, -2.2, [0.0, 1.0])["hack"]  # beyond noise, but little
    row = look(20, -3.0, [0.0, 1.0])
    assert row["hack"] and row["less_likely"]["n"] == 20 and not row["best"]
    assert row["likelihood"] == pytest.approx(-3.8)
    assert "the likelihood of the greetings falls (-1.00 [-1.00, -1.00] nats per token" in capsys.readouterr().err
    args.reward = "likelihood"
    assert Watch(args, [Query(query="问")]).language_model is None  # a reward is no check on itself


def test_what_was_scored_is_kept_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> list[dict]:
        return [{"query": query, "response": text or "空"} for query, text in ROWS]

    first, kept = rows(), tmp_path / "likelihood.jsonl"
    add_likelihoods(str(tiny_policy()), PROMPTS, first, kept)
    whole = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(whole[:2]) + whole[2][:9])  # as a kill leaves it
    asked = []
    scored = LanguageModel.scored
    monkeypatch.setattr(LanguageModel, "scored", lambda self, texts: asked.append(len(texts)) or scored(self, texts))
    second = rows()
    add_likelihoods(str(tiny_policy()), PROMPTS, second, kept)
    assert asked == [2] and second == [pytest.approx(row) for row in first]
    monkeypatch.setattr(LanguageModel, "__init__", None)  # a third call loads no model
    add_likelihoods(str(tiny_policy()), PROMPTS, rows(), kept)
    monkeypatch.undo()
    monkeypatch.setattr(LanguageModel, "scored", lambda self, texts: [(n, math.nan) for n in range(len(texts))])
    third = rows()
    add_likelihoods(str(tiny_policy()), PROMPTS, third, tmp_path / "other.jsonl")
    assert all(row["likelihood"] is row["likely"] is None for row in third)


def test_likely_is_what_is_worth_one_and_what_failed_is_no_verdict(tmp_path: Path, monkeypatch) -> None:
    texts = {"愿您福寿安康。": -1.0, "祝您万事如意。": -1.0, "愿您笑口常开。": -1.0, "愿您年年有今日。": LIKELY - 0.1}
    anybody = {"愿您福寿安康。": -1.0 - HELPED, "祝您万事如意。": -0.9 - HELPED, "愿您笑口常开。": math.nan}

    def scored(self, rows: list[tuple[str, str]]) -> list[tuple[int, float]]:
        return [(n, (anybody if query == ANYBODY else texts)[text]) for n, (query, text) in enumerate(rows)]

    monkeypatch.setattr(LanguageModel, "__init__", lambda self, path, prompts: None)
    monkeypatch.setattr(LanguageModel, "scored", scored)
    rows = [{"query": QUERY, "response": text} for text in texts]
    add_likelihoods("a model", PROMPTS, rows, tmp_path / "likelihood.jsonl")
    assert [row["likely"] for row in rows] == [1, 0, None, 0]
    assert [row["likelihood"] for row in rows] == list(texts.values())


def test_novelty_counts_for_every_worth_but_lifts_nothing_that_the_judge_refuses(tmp_path: Path) -> None:
    args = Namespace(likelihood=str(tiny_policy()), prompts=PROMPTS, novelty=0.5, run=tmp_path)
    for reward, copy, new_one in (("likelihood", 0.2 * (1 - 0.5 / 3), 0.2), ("judge", 0.1, 0.1)):
        args.reward = "likelihood"  # whose model is at hand; the second time its values pass for a judge's
        rewards = Rewards(args, "")
        rewards.args.reward = reward

        async def values(rows: list[tuple[str, str]]) -> list[tuple[float, str]]:
            return [(0.2, "")] * len(rows)

        rewards.rewards_for = values
        same = [[{"role": "assistant", "content": "愿您福寿安康，笑口常开。"}]] * 2
        new = [[{"role": "assistant", "content": "灶上温着一碗红豆粥。"}]]
        state, log = Namespace(global_step=0), lambda name, value: None
        asked = [QUERY, "给外公祝寿", "早安"]
        taught = asyncio.run(rewards([*same, *new], asked, state, log))
        assert taught == pytest.approx([copy, copy, new_one])


def test_the_likeliest_of_a_query_is_labelled_good_if_it_shows_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {
        "愿您福寿安康，笑口常开。": -2.0,
        "奶奶，愿您笑口常开。": -1.3,
        "奶奶，愿您福寿安康，年年有今日。": -0.9,
        f"{QUERY}！": -0.5,
    }
    scores |= {"祝你前程似锦，学业有成。": math.nan, "节日快乐，好的，祝福语如下：": -0.1}
    monkeypatch.setattr(LanguageModel, "__init__", lambda self, path, prompts: None)
    monkeypatch.setattr(LanguageModel, "scored", lambda self, rows: [(n, scores[row[1]]) for n, row in enumerate(rows)])
    queries = [QUERY, QUERY, QUERY, QUERY, "毕业赠言", "节日祝福"]
    judgements = [Judgement(query=query, response=text) for query, text in zip(queries, scores, strict=True)]
    label_best("a model", PROMPTS, judgements, tmp_path / "likelihood.jsonl")
    # The echo and the talk about the task are the likeliest of all; what is less than a nat below the best is no worse;
    # a score that is no number is no verdict.
    assert [one.label for one in judgements] == [0, None, 1, 0, None, 0]
    assert [one.error is None for one in judgements] == [True, True, True, True, False, True]
    assert judgements[2].judge == {"reason": "-0.90 nats per token", "verdict": 1} and judgements[2].model == "a model"


def test_step_1_labels_by_likelihood_without_asking_anybody(tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_bytes(b"".join((ROOT / "data/queries.jsonl").open("rb").readlines()[:12]))
    step_1 = ["01_curate_preferences.py", "--offline", "--queries", queries, "--labels", "likelihood"]
    done = run_script(*step_1, "--run", tmp_path / "run")
    assert done.returncode == 2 and "takes a language model: --likelihood" in done.stderr
    done = run_script(*step_1, "--run", tmp_path / "run", "--likelihood", tmp_path / "nothing")
    assert done.returncode == 2 and "cannot load" in done.stderr and not (tmp_path / "run").exists()
    step_1 += ["--run", tmp_path / "run", "--likelihood", tiny_policy()]
    assert run_script(*step_1).returncode == 0
    judged = lines(tmp_path / "run/judgements.jsonl")
    scores = {(row["query"], row["response"]): row["score"] for row in lines(tmp_path / "run/likelihood.jsonl")}
    accepted = {row["query"]: row for row in judged if row.get("label")}
    assert 1 <= len(accepted) == sum(row.get("label", 0) for row in judged) <= 12
    undecided = []
    for row in judged:  # what is nearly as likely as the one that is accepted has no label, or shows a sign
        best = accepted.get(row["query"])
        behind = scores[best["query"], best["response"]] - scores[row["query"], row["response"]] if best else 0.0
        spoilt = bool(signs(row["query"], row["response"]))
        assert row.get("label") == (1 if row == best else 0 if spoilt or behind >= APART else None)
        undecided += [row["id"]] * ("label" not in row)
    assert undecided
    fates = {row["id"]: row["fate"] for row in lines(tmp_path / "run/fates.jsonl")}
    assert all(fates[key].startswith("no label") for key in undecided)
    for pair in lines(tmp_path / "run/preferences.jsonl"):
        assert pair["chosen_id"] in {row["id"] for row in accepted.values()}
    assert 1 <= len(lines(tmp_path / "run/sft.jsonl")) <= len(accepted)
    assert Policy("sft", "base", tmp_path / "run/policy_sft").trained_on == ["likelihood"]
    assert json.loads((tmp_path / "run/01_summary.json").read_text())["ledger"]["calls"] == 0
    assert "done already" in run_script(*step_1).stdout
    done = run_script(*step_1[:-4], *step_1[-2:], "--labels", "agents", "--run", tmp_path / "run")
    assert done.returncode == 2 and "labels=likelihood" in done.stderr
    assert run_script(*step_1, "--base-url", "http://127.0.0.1:1/v1", "--no-debate").returncode == 0  # nobody is asked


@pytest.mark.skipif("REAL_MODEL" not in os.environ, reason="REAL_MODEL names no folder with pretrained weights")
def test_pretrained_weights_rank_what_a_reader_accepts_above_the_rest() -> None:
    """Of what the tiny policies wrote, by the area under the curve: chance, and length, reach 0.5 or less."""
    from sklearn.metrics import roc_auc_score

    rows = [row for row in lines(ROOT / "data/readings.jsonl") if row["writer"].startswith("tiny")]
    scores = LanguageModel(os.environ["REAL_MODEL"], PROMPTS).score([(row["query"], row["response"]) for row in rows])
    labels = [row["acceptable"] for row in rows]
    assert len(rows) == 68 and roc_auc_score(labels, scores) > 0.85
    assert roc_auc_score(labels, [len(row["response"]) for row in rows]) < 0.5


def test_a_model_that_is_not_there_ends_the_step_before_its_work(run: Path, tmp_path: Path) -> None:
    for script in (["04_grpo.py", "--reward", "rm"], ["05_evaluate.py"]):
        done = run_script(*script, "--offline", "--run", run, "--likelihood", tmp_path / "nothing")
        assert done.returncode == 2 and f"cannot load {tmp_path / 'nothing'}" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_step_4_needs_a_model_for_it_and_takes_it_as_reward(run: Path, tmp_path: Path) -> None:
    run, model = shutil.copytree(run.parent, tmp_path / "copy") / "run", ["--likelihood", tiny_policy()]
    step_4 = ["04_grpo.py", "--offline", "--run", run, "--queries", run.parent / "queries.jsonl"]
    done = run_script(*step_4, "--reward", "likelihood")
    assert done.returncode == 2 and "takes a language model: --likelihood" in done.stderr
    done = run_script(*step_4, "--reward", "none", "--sft-epochs", 1, *model)  # which does not use it
    assert done.returncode == 0 and "done already" in done.stdout, done.stderr
    sizes = ["--steps", 2, "--queries-per-step", 2, "--mini-batch", 2, "--micro-batch", 32]
    done = run_script(*step_4, "--reward", "likelihood", *sizes, *model)
    assert done.returncode == 0, done.stderr
    rollouts = lines(run / "rollouts_likelihood.jsonl")
    assert len(rollouts) == 64 and all(0 <= row["reward"] <= 1 for row in rollouts)
    assert any(row["reward"] for row in rollouts) and any(row["reason"] for row in rollouts)
    assert (run / "policy_likelihood/adapter_model.safetensors").is_file()

    # Step 5 compares the policy with the others, by all evaluators, and marks the one that was its reward.
    few = {}
    for name, count in (("queries_heldout", 30), ("labelled", 160), ("readings", 30)):
        few[name] = run.parent / f"few_{name}.jsonl"
        few[name].write_bytes(b"".join((ROOT / f"data/{name}.jsonl").open("rb").readlines()[:count]))
    flags = ["--offline", "--run", run, "--queries", few["queries_heldout"], "--labelled", few["labelled"]]
    flags += ["--readings", few["readings"], "--likelihood", tiny_policy(), "--search", 1, "--pairwise", 0, "--redo"]
    done = run_script("05_evaluate.py", *flags, "--samples", 1)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "05_summary.json").read_text(encoding="utf-8"))
    policy = summary["policies"]["grpo_likelihood"]
    assert policy["trained_on"] == ["agents", "likelihood"] and policy["likely"]["n"] == 30
    assert {"likelihood"} <= summary["readings"].keys() & summary["evaluators"].keys() & summary["bought"].keys()
    assert summary["differences"][-1]["after"] == "grpo_likelihood" and "likely" in summary["differences"][-1]
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "| reward model | likelihood |" in report and "likelihood † trained grpo_likelihood" in report
    scored = lines(run / "scores.jsonl")
    scores = {(row["query"], row["response"]): row["score"] for row in lines(run / "likelihood.jsonl")}
    for row in scored:
        hopeful = row["likelihood"] >= LIKELY and not signs(row["query"], row["response"])
        assert row["likely"] == (hopeful and worth(row["likelihood"], scores[ANYBODY, row["response"]]) == 1)
