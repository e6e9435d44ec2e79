"""tools/export_verl.py: the authors' columns, a reward function that runs on its own, a command to start it.

The last tests need verl itself: .ci/run installs it for them, and without it they are skipped.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
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


def scores(module: ModuleType, *rows: tuple[str, str]) -> list[float | BaseException]:
    """What compute_score gives, or raises, for (query, text) rows that verl asks about at the same time."""

    async def ask_all() -> list:
        work = [module.compute_score("greetings", text, query, {}) for query, text in rows]
        found = await asyncio.gather(*work, return_exceptions=True)
        if hasattr(module.rewards, "client"):
            await module.rewards.client.__aexit__(None, None, None)
        return found

    return asyncio.run(ask_all())


def launch_words(folder: Path, *flags: str, **environment: str) -> list[str]:
    """The arguments that run.sh gives to python3, here a stand-in that prints them."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "python3").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (binaries / "python3").chmod(0o755)
    environment["PATH"] = f"{binaries}:/usr/bin:/bin"
    done = subprocess.run(["bash", folder / "run.sh", *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def verl_config(folder: Path, *flags: str):
    """verl's configuration of an exported run, made from run.sh's words as verl makes it; skips without verl."""
    pytest.importorskip("verl", reason="verl is not installed (.ci/run installs it)")
    from hydra import compose, initialize_config_module

    words = launch_words(folder, *flags)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=words[2:])


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An export with --reward judge, whose endpoint answers as the rule-based critic but never judges 蓝鲸."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    version = {"principles": ["不重复，同一句话反复说不合格。"], "accepted": True, "version": 0}
    (tmp_path / "principles.jsonl").write_text(json.dumps(version, ensure_ascii=False) + "\n", encoding="utf-8")

    def answer(request: dict) -> Reply:
        return status(400) if "蓝鲸" in request["messages"][-1]["content"] else critic(request)

    with endpoint(answer) as server:
        flags = ["--reward", "judge", "--base-url", server.url, "--model", "m", "--attempts", 1]
        export(tmp_path, tmp_path / "verl", *flags, "--policy", tiny_policy())
        yield tmp_path / "verl"


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
    found = scores(reward_of(tmp_path / "verl"), (QUERY, GOOD), (QUERY, SPOILT), (QUERY, f" {GOOD}\n"), (QUERY, " "))
    rm = RewardModel(run / "rm", str(tiny_policy()), PROMPTS)
    wanted = rm.score([(QUERY, GOOD), (QUERY, SPOILT), (QUERY, GOOD), (QUERY, "")])
    assert found[:3] == pytest.approx(wanted[:3], abs=1e-4)
    assert found[3] == pytest.approx(min(wanted), abs=1e-4)  # an empty text is never better than the worst


def test_the_reward_is_the_judges_verdict_and_a_failure_is_no_score(judged: Path) -> None:
    rows = [(QUERY, GOOD), (QUERY, SPOILT), (QUERY, "蓝鲸"), (QUERY, ""), ("生日祝福", GOOD[1:])]
    good, spoilt, failed, empty, other = scores(reward_of(judged), *rows)
    assert good == other == 1.0 and spoilt == empty == 0.0
    assert isinstance(failed, RuntimeError) and "failed" in str(failed)


def test_the_launch_command_holds_the_papers_settings(tmp_path: Path) -> None:
    export(tmp_path, tmp_path / "verl", "--reward", "rm", "--policy", tiny_policy())
    words = launch_words(tmp_path / "verl", "trainer.logger=x", NODES="2")
    assert words[:2] == ["-m", "verl.trainer.main_ppo"] and words[-1] == "trainer.logger=x"
    said = dict(word.split("=", 1) for word in words[2:])
    for name, value in {
        "algorithm.adv_estimator": "grpo", "data.train_batch_size": "32", "data.max_prompt_length": "256",
        "data.max_response_length": "512", "actor_rollout_ref.actor.ppo_mini_batch_size": "16",
        "actor_rollout_ref.actor.optim.lr": "3e-7", "actor_rollout_ref.actor.kl_loss_coef": "0.001",
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl", "actor_rollout_ref.rollout.n": "4",
        "trainer.total_epochs": "5", "trainer.nnodes": "2", "trainer.n_gpus_per_node": "4",
        "reward.custom_reward_function.path": str(tmp_path / "verl/reward.py"),
    }.items():  # fmt: skip
        assert said[name] == value


def test_verl_takes_every_flag_and_uses_our_reward(tmp_path: Path) -> None:
    export(tmp_path, tmp_path / "verl", "--reward", "judge", "--policy", tiny_policy())
    config = verl_config(tmp_path / "verl")  # an unknown flag would raise here
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))
    assert need_reference_policy(config) and not need_critic(config)
    # verl also takes the reward's flags of its older versions, and ignores them: so ask for what it would call.
    assert config.reward.custom_reward_function.path == str(tmp_path / "verl/reward.py")
    manager = load_reward_manager(config, tokenizer=None)
    assert manager.is_async_reward_score


def test_verl_refuses_a_flag_that_it_does_not_know(tmp_path: Path) -> None:
    export(tmp_path, tmp_path / "verl", "--reward", "judge", "--policy", tiny_policy())
    with pytest.raises(Exception, match="no_such_flag"):
        verl_config(tmp_path / "verl", "reward.no_such_flag=1")


def test_verl_reads_the_prompts(tmp_path: Path) -> None:
    export(tmp_path, tmp_path / "verl", "--reward", "judge", "--policy", tiny_policy())
    config = verl_config(tmp_path / "verl")
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    for files, source in (
        (config.data.train_files, ROOT / "data/queries.jsonl"),
        (config.data.val_files, ROOT / "data/queries_heldout.jsonl"),
    ):
        dataset, queries = RLHFDataset(files, tokenizer, config.data), [row["query"] for row in lines(source)]
        assert len(dataset) == len(queries)  # none was too long
        for number in (0, len(queries) - 1):
            row = dataset[number]
            assert row["raw_prompt"] == conversation(queries[number], PROMPTS)
            assert row["reward_model"]["ground_truth"] == queries[number] and row["index"] == number


def test_verls_reward_worker_scores_a_completion_and_drops_one_without_a_score(judged: Path) -> None:
    config = verl_config(judged)
    import numpy as np
    import torch
    from verl import DataProto
    from verl.experimental.reward_loop import RewardLoopWorker

    async def ask_all() -> list:
        worker, work = RewardLoopWorker(config), []
        for text in (GOOD, SPOILT, "蓝鲸"):
            # One completion, as verl's agent loop hands it to a reward worker.
            response = torch.tensor([worker.input_tokenizer(text + "<|im_end|>")["input_ids"]])
            mask = torch.ones(1, 1 + response.shape[1], dtype=int)
            tensors = {"prompts": response[:, :1], "responses": response, "attention_mask": mask}
            row = {"data_source": "greetings", "reward_model": {"ground_truth": QUERY}, "extra_info": {"index": 0}}
            others = {name: np.array([value], object) for name, value in row.items()}
            work.append(worker.compute_score(DataProto.from_dict(tensors, others)))
        found = await asyncio.gather(*work, return_exceptions=True)
        reward_file = worker.reward_manager.compute_score.args[0].__globals__
        await reward_file["rewards"].client.__aexit__(None, None, None)
        return found

    good, spoilt, failed = asyncio.run(ask_all())
    assert (good["reward_score"], spoilt["reward_score"]) == (1.0, 0.0)
    assert isinstance(failed, RuntimeError)  # to verl, a rollout that failed: the group goes on without it
