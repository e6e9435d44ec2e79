"""tools/export_verl.py: the authors' columns, a reward function that runs on its own, a command to start it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet
import pytest
from conftest import ROOT, lines, run_script
from endpoint import Reply, critic, endpoint, status

from common.offline.tiny_model import tiny_policy
from common.prompts import PROMPTS, conversation
from common.reward_model import RewardModel

# As in the authors' release (grpo_data/train.parquet there).
COLUMNS = {
    "prompt": "list<element: struct<content: string, role: string>>", "data_source": "string", "ability": "string",
    "reward_model": "struct<ground_truth: string, style: string>", "extra_info": "struct<index: int64, split: string>",
}  # fmt: skip
QUERY, GOOD = "给老师的教师节祝福", "老师，您当年在灯下改过的作文，我还留着。教师节快乐，愿您今晚早些歇下。"
SPOILT = GOOD + GOOD


def export(run: Path, folder: Path, *flags: object) -> None:
    done = run_script("tools/export_verl.py", folder, "--run", run, *flags)
    assert done.returncode == 0, done.stderr


def reward_of(folder: Path) -> ModuleType:
    """reward.py, imported from its file as verl does it."""
    spec = importlib.util.spec_from_file_location("custom_module", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(module: ModuleType, *rows: tuple[str, str]) -> list[dict]:
    queries, texts = map(list, zip(*rows, strict=True))
    return module.compute_score(["greetings"] * len(rows), texts, queries, [{} for _ in rows])


def test_the_columns_are_the_authors(run: Path, tmp_path: Path) -> None:
    queries = run.parent / "queries.jsonl"
    export(run, tmp_path / "verl", "--offline", "--reward", "judge", "--queries", queries)
    for name, source in (("train", queries), ("test", ROOT / "data/queries_heldout.jsonl")):
        table = pyarrow.parquet.read_table(tmp_path / f"verl/{name}.parquet")
        assert {field.name: str(field.type) for field in table.schema} == COLUMNS
        rows, given = table.to_pylist(), [row["query"] for row in lines(source)]
        assert [row["reward_model"]["ground_truth"] for row in rows] == given
        assert [row["prompt"] for row in rows] == [conversation(query, PROMPTS) for query in given]
        assert [row["extra_info"] for row in rows] == [{"index": n, "split": name} for n in range(len(rows))]


def test_the_columns_above_are_those_of_the_release() -> None:
    (released,) = list(ROOT.parent.glob("shared/paper_data/dataset/grpo_data/train.parquet")) or [None]
    if not released:
        pytest.skip("the authors' parquet files are not here")
    assert {field.name: str(field.type) for field in pyarrow.parquet.read_schema(released)} == COLUMNS


def test_the_reward_is_the_reward_models_score(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "verl", "--offline", "--reward", "rm")
    found = scores(reward_of(tmp_path / "verl"), (QUERY, GOOD), (QUERY, SPOILT), (QUERY, f" {GOOD}\n"))
    rm = RewardModel(run / "rm", str(tiny_policy()), 16, PROMPTS)
    wanted = rm.score([(QUERY, GOOD), (QUERY, SPOILT), (QUERY, GOOD)])
    assert [row["score"] for row in found] == pytest.approx(wanted, abs=1e-4)
    assert all(row["failed"] == 0 for row in found)


def test_the_reward_is_the_judges_verdict_and_a_failure_is_no_signal(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def sometimes(request: dict) -> Reply:
        return status(400) if "蓝鲸" in request["messages"][-1]["content"] else critic(request)

    with endpoint(sometimes) as server:
        flags = ["--reward", "judge", "--base-url", server.url, "--model", "m", "--attempts", 1]
        export(run, tmp_path / "verl", *flags, "--policy", tiny_policy())
        module = reward_of(tmp_path / "verl")
        rows = [
            (QUERY, GOOD),
            (QUERY, SPOILT),
            (QUERY, "蓝鲸"),
            (QUERY, ""),
            (QUERY, GOOD[:-1]),
            ("生日祝福", GOOD[1:]),
        ]
        found = scores(module, *rows)
    heard = [row["score"] for row in (found[i] for i in (0, 1, 3, 4))]
    assert found[0]["score"] in (0.0, 1.0) and found[1]["score"] == found[3]["score"] == 0.0
    assert found[2] == {"score": sum(heard) / 4, "failed": 1.0}
    assert sum(row["failed"] for row in found) == 1


def test_the_launch_command_holds_the_papers_settings(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "verl", "--reward", "rm", "--policy", tiny_policy())
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "verl/run.sh", "trainer.logger=x"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "NODES": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    assert words[:2] == ["-m", "verl.trainer.main_ppo"] and words[-1] == "trainer.logger=x"
    said = dict(word.split("=", 1) for word in words[2:])
    for name, value in {
        "algorithm.adv_estimator": "grpo", "data.train_batch_size": "32", "data.max_prompt_length": "256",
        "data.max_response_length": "512", "actor_rollout_ref.actor.ppo_mini_batch_size": "16",
        "actor_rollout_ref.actor.optim.lr": "3e-7", "actor_rollout_ref.actor.kl_loss_coef": "0.001",
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl", "actor_rollout_ref.rollout.n": "4",
        "trainer.total_epochs": "5", "trainer.nnodes": "2", "trainer.n_gpus_per_node": "4",
        "custom_reward_function.path": str(tmp_path / "verl/reward.py"),
    }.items():  # fmt: skip
        assert said[name] == value
