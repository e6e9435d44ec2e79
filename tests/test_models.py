"""Policy and reward model on the tiny model: what comes out does not depend on batches, padding or reloading."""

from pathlib import Path

import pytest
from conftest import ROOT

from common.offline.flaws import flaws_of
from common.offline.tiny_model import tiny_policy
from common.policy import generate, load_policy, lora
from common.prompts import conversation
from common.records import Query, read
from common.reward_model import RewardModel
from common.stats import NgramClassifier, length_rule
from common.trainers import trainer_settings

PROMPTS = ROOT / "prompts"


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_policy())


@pytest.fixture(scope="module")
def queries() -> list[str]:
    return [q.query for q in read(ROOT / "data/queries_heldout.jsonl", Query)][:24]


def greetings(base: str, queries: list[str], bits: int, seed: int) -> list[str]:
    model, tokenizer = load_policy(base, bits)
    return generate(
        model, tokenizer, [conversation(q, PROMPTS) for q in queries], temperature=0.7, max_tokens=40,
        batch_size=8, seed=seed,
    )  # fmt: skip


def test_the_tiny_model_is_kept_small_and_reused(base: str) -> None:
    model, tokenizer = load_policy(base, 16)
    assert model.num_parameters() <= 5_000_000 and model.config.model_type == "qwen2"
    assert tokenizer.decode(tokenizer("祝您生日快乐！")["input_ids"]) == "祝您生日快乐！"
    assert str(tiny_policy()) == base


def test_the_tiny_model_writes_readable_greetings_some_of_the_time(base: str, queries: list[str]) -> None:
    texts = greetings(base, queries, 16, seed=0)
    found = [flaws_of(query, text) for query, text in zip(queries, texts, strict=True)]
    assert sum(flaws.get("broken") != 2 for flaws in found) > 0.3 * len(found)  # readable
    assert any(2 in flaws.values() for flaws in found)  # and something to improve


def test_the_same_seed_gives_the_same_greetings(base: str, queries: list[str]) -> None:
    first, again, other = (greetings(base, queries, 16, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_scores_do_not_depend_on_batch_order_or_padding(run: Path, base: str, queries: list[str]) -> None:
    rm = RewardModel(run / "rm", base, 16, PROMPTS)
    rows = [(q, "愿你" + "岁岁平安，" * (i % 7)) for i, q in enumerate(queries)]
    together, alone = rm.score(rows, batch_size=24), rm.score(rows, batch_size=1)
    backwards = rm.score(rows[::-1], batch_size=5)[::-1]
    assert together == pytest.approx(alone, abs=1e-3)
    assert together == pytest.approx(backwards, abs=1e-3)
    assert RewardModel(run / "rm", base, 16, PROMPTS).score(rows) == pytest.approx(together, abs=1e-3)


def test_a_reward_model_of_another_base_is_refused(run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        RewardModel(run / "rm", "somebody/else", 16, PROMPTS)
    assert stopped.value.code == 2 and "was made for the base" in capsys.readouterr().err


def test_four_bits_on_a_cpu_write_and_learn(base: str, queries: list[str], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    assert all(text for text in greetings(base, queries[:4], 4, seed=0))
    model, tokenizer = load_policy(base, 4)
    assert model.is_loaded_in_4bit
    rows = [
        {"prompt": conversation(q, PROMPTS), "completion": [{"role": "assistant", "content": "好。"}]} for q in queries
    ]
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=6, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=1,
        **trainer_settings(4),
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        peft_config=lora(16, "CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


def test_the_null_baselines_find_what_is_there_to_find() -> None:
    texts = [f"愿你{'平安' * (i % 5 + 1)}" for i in range(20)] + [f"恭喜{'发财' * (i % 5 + 6)}" for i in range(20)]
    labels = [1] * 20 + [0] * 20
    ngrams = NgramClassifier(texts, labels)
    assert [odds > 0 for odds in ngrams(["愿你平安", "恭喜发财"])] == [True, False]
    least = length_rule(["一" * n for n in (3, 4, 5, 9, 10, 11)], [0, 0, 0, 1, 1, 1])
    assert 5 < least <= 9
