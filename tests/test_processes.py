"""`accelerate launch` with two processes on a CPU: the same data and updates as one, one writer for each file."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script

LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--num_processes"]


def launched(processes: int, run: Path, script: str, *flags: object) -> None:
    command = [script, "--offline", "--run", str(run), *map(str, flags)]
    if processes == 1:
        done = run_script(*command)
    else:
        done = subprocess.run(
            [sys.executable, *LAUNCH, str(processes), *command], cwd=ROOT, text=True, capture_output=True, timeout=550,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    script = script[:2]
    assert sum(line.startswith(f"{script}: --reward") for line in done.stdout.splitlines()) <= 1  # said once


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, pairs, queries and principles of a small run."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(row) for row in (ROOT / "data/references.jsonl").open(encoding="utf-8")][:96]
    files = {"sft": [], "preferences": [], "queries": []}
    for row in rows:
        prompt = [{"role": "user", "content": f"请只生成一条祝福语：{row['query']}"}]
        good, bad = ([{"role": "assistant", "content": text}] for text in (row["response"], row["response"][::-1]))
        files["sft"].append({"prompt": prompt, "completion": good})
        files["preferences"].append({"prompt": prompt, "chosen": good, "rejected": bad, "query": row["query"]})
        files["queries"].append({"query": row["query"]})
    files["principles"] = [{"principles": ["读来通顺。"], "accepted": True, "version": 0}]
    for name, records in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> run folder of SFT, a reward model and two steps of GRPO."""
    found = {}
    for processes in (1, 2):
        found[processes] = run = tmp_path_factory.mktemp(f"of_{processes}") / "run"
        launched(processes, run, "04_grpo.py", "--reward", "none", "--sft", data / "sft.jsonl", "--sft-epochs", 1)
        pairs = ["--preferences", data / "preferences.jsonl", "--epochs", 1, "--stress-size", 10, "--derived", 1]
        launched(processes, run, "02_train_rm.py", *pairs)
        flags = ["--reward", "judge", "--queries", data / "queries.jsonl", "--principles", data / "principles.jsonl"]
        flags += ["--steps", 4, "--queries-per-step", 8, "--mini-batch", 4, "--micro-batch", 8, "--samples", 4]
        flags += ["--max-tokens", 12, "--watch-every", 1, "--watch-queries", 8, "--save-every", 1]
        launched(processes, run, "04_grpo.py", *flags)
    return found


def test_supervised_updates_are_the_same(runs: dict[int, Path]) -> None:
    one, two = (lines(run / "metrics_none.jsonl") for run in runs.values())
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 7))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.02)
    assert [row["loss"] for row in one] != pytest.approx([one[0]["loss"]] * 6, rel=0.02)  # or it would prove nothing


def test_the_reward_model_is_the_same_within_noise(runs: dict[int, Path]) -> None:
    one, two = (json.loads((run / "02_summary.json").read_text()) for run in runs.values())
    assert [len(lines(run / "rm_eval.jsonl")) for run in runs.values()] == [one["eval"]["all"]["n"]] * 2
    assert two["eval"]["all"]["lo"] <= one["eval"]["all"]["value"] <= two["eval"]["all"]["hi"]
    # Pairs are batched by length, so smaller batches are other batches: the same updates on average, not one by one.
    means = []
    for summary in (one, two):
        losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
        means.append(sum(losses) / len(losses))
    assert means[1] == pytest.approx(means[0], rel=0.1)


def test_grpo_writes_for_the_same_queries_and_gathers_the_rewards(runs: dict[int, Path]) -> None:
    one, two = (lines(run / "rollouts_judge.jsonl") for run in runs.values())
    assert Counter(row["step"] for row in two) == Counter(row["step"] for row in one) == {0: 32, 2: 32}
    for step in (0, 2):
        asked = [[row["query"] for row in rows if row["step"] == step] for rows in (one, two)]
        assert Counter(asked[0]) == Counter(asked[1]) and set(Counter(asked[0]).values()) == {4}
    for run in runs.values():
        metrics = lines(run / "metrics_judge.jsonl")
        assert [row["step"] for row in metrics] == [1, 2, 3, 4]
        for step in (0, 2):
            rewards = [row["reward"] for row in lines(run / "rollouts_judge.jsonl") if row["step"] == step]
            assert metrics[step]["raw_reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    assert all(len({row["step"] for row in lines(run / "watch_judge.jsonl")}) == 3 for run in runs.values())
    for run in runs.values():
        assert not list(run.rglob("*.tmp")) and (run / "policy_judge/adapter_model.safetensors").is_file()


def test_a_number_of_processes_that_does_not_divide_the_batch_is_named(data: Path, tmp_path: Path) -> None:
    flags = ["--offline", "--reward", "none", "--sft", str(data / "sft.jsonl"), "--sft-batch-size", "3"]
    done = subprocess.run(
        [sys.executable, "04_grpo.py", "--run", str(tmp_path / "run"), *flags], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env=os.environ | {"WORLD_SIZE": "2"},
    )  # fmt: skip
    assert done.returncode == 2 and "2 processes cannot share 1 batches of 3" in done.stderr
