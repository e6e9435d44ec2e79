"""Likelihood under a language model: its value, what it is worth, as a reward, to the watch, in step 5."""

import asyncio
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lines, run_script

from common.likelihood import LIKELY, LanguageModel, worth
from common.offline.tiny_model import tiny_policy
from common.prompts import PROMPTS, conversation
from common.records import Query
from common.rewards import Rewards
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


def test_what_is_likely_enough_is_worth_one_and_what_is_spoilt_nothing() -> None:
    assert worth(QUERY, GREETING, LIKELY) == worth(QUERY, GREETING, -0.1) == 1
    assert worth(QUERY, GREETING, LIKELY - 1) == pytest.approx(1 / math.e)
    assert worth(QUERY, GREETING, LIKELY - 0.01) < 1
    for spoilt in ("", f"{QUERY}：{GREETING}", f"好的，祝福语如下：{GREETING}", f"{GREETING}愿您"):
        assert worth(QUERY, spoilt, -0.1) == 0


def test_as_a_reward_it_says_of_what_is_worth_nothing_why() -> None:
    args = Namespace(reward="likelihood", likelihood=str(tiny_policy()), prompts=PROMPTS, micro_batch=2)
    rewards = Rewards(args, "")
    rewards.model.score = lambda rows, batch: [LIKELY - 1, 0.0]
    found = asyncio.run(rewards.rewards_for([(QUERY, GREETING), (QUERY, f"{QUERY}！{GREETING}")]))
    assert found[0] == (pytest.approx(1 / math.e), "") and found[1][0] == 0 and "echo" in found[1][1]


def test_the_watch_warns_where_a_rising_reward_makes_greetings_less_likely(tmp_path: Path, capsys) -> None:
    args = Namespace(seed=0, watch_queries=20, reward="rm", run=tmp_path, prompts=PROMPTS, watch_every=4)
    args.likelihood = str(tiny_policy())
    watch = Watch(args, [Query(query=f"问{n}") for n in range(20)])
    watch.write = lambda model, tokenizer: ["祝好。"] * 20
    watch.grade = lambda texts: asyncio.sleep(0, [2.0] * 20)
    noise = [0.1 * (number % 5) for number in range(20)]

    def look(step: int, level: float, rewards: list[float]) -> dict:
        watch.language_model.score = lambda rows: [level - noise[number] for number in range(len(rows))]
        return watch.look(None, None, step, rewards)

    assert not look(0, -2.0, [])["less_likely"]
    assert not look(4, -2.0, [0.0, 1.0])["hack"]  # as likely as before
    assert not look(8, -3.0, [1.0, 0.0])["hack"]  # less likely, and so is the reward
    row = look(12, -3.0, [0.0, 1.0])
    assert row["hack"] and row["less_likely"] and not row["best"] and row["likelihood"] == pytest.approx(-3.2)
    assert "the likelihood of the greetings falls (-1.00 nats per token)" in capsys.readouterr().err
    args.reward = "likelihood"
    assert Watch(args, [Query(query="问")]).language_model is None  # a reward is no check on itself


def test_step_4_needs_a_model_for_it_and_takes_it_as_reward(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run.parent, tmp_path / "copy") / "run"
    flags = ["--reward", "likelihood", "--offline", "--run", run, "--queries", run.parent / "queries.jsonl"]
    done = run_script("04_grpo.py", *flags)
    assert done.returncode == 2 and "takes a language model: --likelihood" in done.stderr
    flags += [
        "--steps",
        2,
        "--queries-per-step",
        2,
        "--mini-batch",
        2,
        "--micro-batch",
        32,
        "--likelihood",
        tiny_policy(),
    ]
    done = run_script("04_grpo.py", *flags)
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
    assert policy["trained_on"] == ["likelihood"] and policy["likely"]["n"] == 30
    assert {"likelihood"} <= summary["readings"].keys() & summary["evaluators"].keys() & summary["bought"].keys()
    assert summary["differences"][-1]["after"] == "grpo_likelihood" and "likely" in summary["differences"][-1]
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "| reward model | likelihood |" in report and "likelihood † trained grpo_likelihood" in report
    scored = lines(run / "scores.jsonl")
    assert all(row["likely"] == (worth(row["query"], row["response"], row["likelihood"]) == 1) for row in scored)
