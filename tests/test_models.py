"""Policy and reward model on the tiny model: what comes out does not depend on batches, padding or reloading."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from conftest import ROOT
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerState,
)

from common import engine, policy
from common.offline.flaws import flaws_of
from common.offline.tiny_model import tiny_policy
from common.policy import (
    check_adapter,
    compute_dtype,
    find_policy,
    generate,
    load_base,
    load_policy,
    load_tokenizer,
    lora,
    model_folder,
)
from common.prompts import conversation
from common.records import Query, read
from common.reward_model import RewardModel
from common.run_folder import launch
from common.stats import length_rule, ngram_classifier
from common.trainers import last_checkpoint, train_from, trainer_settings

PROMPTS = ROOT / "prompts"


@pytest.fixture(scope="module")
def base() -> str:
    return str(tiny_policy())


@pytest.fixture(scope="module")
def queries() -> list[str]:
    return [q.query for q in read(ROOT / "data/queries_heldout.jsonl", Query)][:24]


def greetings(base: str, queries: list[str], bits: int, seed: int, temperature: float = 0.7) -> list[str]:
    model, tokenizer = load_policy(base, bits)
    return generate(
        model, tokenizer, [conversation(q, PROMPTS) for q in queries], temperature=temperature, max_tokens=40,
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


def test_at_temperature_0_the_seed_does_not_matter(base: str, queries: list[str]) -> None:
    first, other = (greetings(base, queries[:8], 16, seed, temperature=0.0) for seed in (0, 1))
    assert first == other


def test_scores_do_not_depend_on_batch_order_or_padding(run: Path, base: str, queries: list[str]) -> None:
    rm = RewardModel(run / "rm", base, PROMPTS)
    rows = [(q, "愿你" + "岁岁平安，" * (i % 7)) for i, q in enumerate(queries)]
    together, alone = rm.score(rows, batch_size=24), rm.score(rows, batch_size=1)
    backwards = rm.score(rows[::-1], batch_size=5)[::-1]
    assert together == pytest.approx(alone, abs=1e-3)
    assert together == pytest.approx(backwards, abs=1e-3)
    assert RewardModel(run / "rm", base, PROMPTS).score(rows) == pytest.approx(together, abs=1e-3)


def test_a_reward_model_of_another_base_is_refused(run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        RewardModel(run / "rm", "somebody/else", PROMPTS)
    assert stopped.value.code == 2 and "was made for the base" in capsys.readouterr().err


def test_four_bits_on_a_cpu_write_and_learn(base: str, queries: list[str], tmp_path: Path) -> None:
    assert all(text for text in greetings(base, queries[:4], 4, seed=0))
    model, tokenizer = load_policy(base, 4)
    assert model.is_loaded_in_4bit
    rows = [
        {"prompt": conversation(q, PROMPTS), "completion": [{"role": "assistant", "content": "好。"}]} for q in queries
    ]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, learning_rate=5e-3, per_device_train_batch_size=8, logging_steps=1,
        **trainer_settings(model),
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        peft_config=lora(16, "CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("stored", "multiplies_in_bf16", "loaded"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float32, True, torch.float32),
    ],
)
def test_on_a_cpu_a_base_computes_in_bf16_if_it_is_stored_in_16_bits_and_the_cpu_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, multiplies_in_bf16: bool, loaded: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies_in_bf16})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    Qwen2ForCausalLM(config).to(stored).save_pretrained(tmp_path)
    for kind, task in ((AutoModelForCausalLM, "CAUSAL_LM"), (AutoModelForSequenceClassification, "SEQ_CLS")):
        model = load_base(kind, str(tmp_path), 16)
        assert {weight.dtype for weight in model.parameters()} == {loaded}
        for part in (model, get_peft_model(model, lora(4, task))):
            assert trainer_settings(part)["bf16"] == (loaded == torch.bfloat16)  # also with an adapter in fp32


def test_without_a_gpu_or_instructions_for_bf16_everything_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    base = str(tiny_policy())
    for bits in (4, 16):
        assert compute_dtype(base, bits) == torch.float32
    assert load_base(AutoModelForCausalLM, base, 4).model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_the_null_baselines_find_what_is_there_to_find() -> None:
    texts = [f"愿你{'平安' * (i % 5 + 1)}" for i in range(20)] + [f"恭喜{'发财' * (i % 5 + 6)}" for i in range(20)]
    labels = [1] * 20 + [0] * 20
    ngrams = ngram_classifier(texts, labels)
    assert ngrams.predict(["愿你平安", "恭喜发财"]).tolist() == [1, 0]
    least = length_rule(["一" * n for n in (3, 4, 5, 9, 10, 11)], [0, 0, 0, 1, 1, 1])
    assert 5 < least <= 9


def a_model(folder: Path, weights: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def test_a_model_s_folder_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path / "models/qwen")
    (tmp_path / "link").symlink_to("models/qwen")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = (folder, "models/qwen/", "./link", "~/models/qwen", "models/../models/qwen")
    assert {model_folder(way) for way in ways} == {str(folder)}
    assert model_folder("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    adapter = an_adapter(tmp_path / "adapter", "./link/")
    assert find_policy(adapter) == (str(folder), adapter)
    check_adapter(adapter, "models/qwen")
    a_model(tmp_path / "models/other")
    with pytest.raises(SystemExit):
        check_adapter(adapter, "models/other")


def test_an_adapter_made_in_a_checkout_that_was_moved_or_copied_finds_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first checkout is still there, and its model at this place is another one, that one is meant."""
    monkeypatch.setattr(policy, "ROOT", tmp_path / "new")
    here = a_model(tmp_path / "new/outputs/tiny/1", "weights")
    there = tmp_path / "old/outputs/tiny/1"
    adapter = an_adapter(tmp_path / "new/outputs/run/policy_sft", str(there))
    assert find_policy(adapter)[0] == str(here)
    check_adapter(adapter, str(here))
    a_model(there, "weights")
    assert find_policy(adapter)[0] == str(here)
    (there / "model.safetensors").write_text("others")
    assert find_policy(adapter)[0] == str(there)
    with pytest.raises(SystemExit):
        check_adapter(adapter, str(here))


def an_adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"w": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


# ---- models as they come ---------------------------------------------------------------------------------------------

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ENDS_LATER = {"eos_token": "<|endoftext|>"}  # a chat model on its base's tokenizer
CHAT = [{"role": "user", "content": "教师节"}, {"role": "assistant", "content": "老师好"}]


@pytest.fixture
def other(base: str, tmp_path: Path) -> Callable[..., str]:
    """other(template, tokenizer=..., config=..., generation_config=...): the tiny model with these values changed.

    A file of None is taken out.
    """

    def make(template: str = "", **changed: dict | None) -> str:
        folder = Path(shutil.copytree(base, tmp_path / "other"))
        if template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        files = {"tokenizer": "tokenizer_config.json", "config": "config.json"}
        for name, values in changed.items():
            file = folder / files.get(name, f"{name}.json")
            if values is None:
                file.unlink()
                continue
            both = json.loads(file.read_text(encoding="utf-8")) | values
            file.write_text(json.dumps(both))
        return str(folder)

    return make


def template_of(base: str) -> str:
    return Path(base, "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer": ENDS_LATER},
        {"tokenizer": ENDS_LATER, "generation_config": {"eos_token_id": [2, 0]}},
        {"tokenizer": ENDS_LATER, "generation_config": {"eos_token_id": 0}},  # the chat template alone knows
        {"tokenizer": ENDS_LATER, "generation_config": None, "config": {"eos_token_id": None}},
        {"tokenizer": {"pad_token": None}, "config": {"pad_token_id": None}},
    ],
    ids=["tokenizer", "list", "template", "no_generation_config", "no_pad"],
)
def test_what_ends_a_turn_ends_a_greeting_whoever_names_it(base: str, queries, other, changed: dict) -> None:
    assert greetings(other(**changed), queries, 16, seed=0) == greetings(base, queries, 16, seed=0)


def test_an_end_that_is_no_special_token_is_no_text(base: str, queries: list[str], other) -> None:
    folder = other(tokenizer=ENDS_LATER | {"extra_special_tokens": []}, generation_config={"eos_token_id": [0, 2]})
    content = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][2]["special"] = False
    Path(folder, "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert greetings(folder, queries, 16, seed=0) == greetings(base, queries, 16, seed=0)


def test_rollouts_end_where_greetings_do(queries: list[str], other, tmp_path: Path) -> None:
    model, tokenizer = load_policy(other(tokenizer=ENDS_LATER, generation_config={"eos_token_id": 0}), 16)
    seen = []

    def reward(completions: list, completion_ids: list[list[int]], **others) -> list[float]:
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=32, num_generations=4, logging_steps=1,
        max_completion_length=40, **trainer_settings(model),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": conversation(query, PROMPTS)} for query in queries])
    trainer = trl.GRPOTrainer(model, reward, config, data, processing_class=tokenizer)
    trainer.train()
    ended = [ids for _, ids in seen if 2 in ids]
    assert len(ended) > 20 and all(ids.index(2) == len(ids) - 1 for ids in ended)
    assert not any("<|" in completion[0]["content"] for completion, _ in seen)
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 1 - len(ended) / len(seen)
    assert log["completions/max_terminated_length"] == max(map(len, ended))


def test_a_pad_token_that_is_the_end_hides_no_end_from_training_and_is_saved(other, tmp_path: Path) -> None:
    model, tokenizer = load_policy(other(tokenizer={"pad_token": None}, config={"pad_token_id": None}), 16)
    rows = [{"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": "好" * n}]} for n in (1, 9)]
    config = trl.SFTConfig(output_dir=str(tmp_path / "sft"), per_device_train_batch_size=2, **trainer_settings(model))
    trainer = trl.SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora(4, "CAUSAL_LM"),
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    assert (batch["labels"] == 2).sum(dim=1).tolist() == [1, 1]
    trainer.save_model(str(tmp_path / "saved"))
    assert load_tokenizer(str(tmp_path / "saved")).pad_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "glm4moe", "gemma", "llama3_1"])
def test_training_and_generation_render_alike(name: str, other) -> None:
    tokenizer = load_tokenizer(other((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")))
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    trained = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained.startswith(prompt) and trained.removeprefix(prompt).strip().startswith("老师好")
    assert 2 in tokenizer(trained.removeprefix(prompt))["input_ids"]  # and the end is learnt


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("deepseek_r1_distill", "puts thoughts or tags before an answer"),
        ("gptoss", "puts thoughts or tags before an answer"),
        (None, "has no chat template"),
    ],
)
def test_a_base_that_cannot_answer_at_once_is_refused_before_it_is_loaded(
    template: str | None, told: str, other, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(policy, "load_base", lambda *some, **more: pytest.fail("it was loaded"))
    folder = other((TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8") if template else "")
    if template is None:
        Path(folder, "chat_template.jinja").unlink()
    with pytest.raises(SystemExit) as stopped:
        load_policy(folder, 16)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and told in line and "--policy" in line


def test_a_template_that_takes_no_system_message_is_one_line(other, capsys) -> None:
    tokenizer = load_tokenizer(other((TEMPLATES / "gemma.jinja").read_text(encoding="utf-8")))
    with pytest.raises(SystemExit) as stopped:
        launch(lambda args: tokenizer.apply_chat_template([{"role": "system", "content": "短"}, *CHAT]), Namespace())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "System role not supported" in line and "policy.md" in line


def test_vllm_gets_one_bos_and_every_end(base: str, other, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine and its module are stand-ins: what counts is what they are asked."""
    folder = other("<|im_start|>" + template_of(base), tokenizer=ENDS_LATER | {"bos_token": "<|im_start|>"})
    asked = []

    class Engine:
        def __init__(self, **options): ...

        def use(self, adapter): ...

        def generate(self, prompts, sampling_params, use_tqdm):
            asked.extend(zip(prompts, sampling_params, strict=True))
            return [Namespace(outputs=[Namespace(text=" 好。 ")]) for _ in prompts]

    monkeypatch.setattr(engine, "engine_class", lambda *some: Engine)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=Namespace))
    writer = engine.Writer(Namespace(engine="vllm", bits=16, max_tokens=9, seed=0, batch_size_generate=2))
    assert writer(folder, None, [CHAT[:1]] * 2, temperature=1.0, seed=3, progress="") == ["好。"] * 2
    prompt, sampling = asked[1]
    assert prompt["prompt_token_ids"][:3].count(1) == 2  # the BOS, and the user's turn
    assert set(sampling.stop_token_ids) == {0, 2} and sampling.seed == 4


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-100])),
        ("adapter_model.safetensors", Path.unlink),
        ("adapter_config.json", lambda file: file.write_text(file.read_text()[:-100])),
    ],
    ids=["weights_cut_off", "no_weights", "config_cut_off"],
)
def test_half_an_adapter_is_named(base: str, tmp_path: Path, capsys, file: str, spoil: Callable) -> None:
    get_peft_model(load_policy(base, 16)[0], lora(4, "CAUSAL_LM")).save_pretrained(tmp_path)
    assert policy.find_policy(tmp_path) == (base, tmp_path)
    spoil(tmp_path / file)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        policy.find_policy(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "not whole" in line and str(tmp_path) in line


# ---- trainings that are cut short ------------------------------------------------------------------------------------


@pytest.fixture
def sft(base: str, queries: list[str], tmp_path: Path) -> Callable[[float], trl.SFTTrainer]:
    """sft(epochs) -> a trainer of three updates per epoch, which saves each."""

    def make(epochs: float) -> trl.SFTTrainer:
        model, tokenizer = load_policy(base, 16)
        rows = [{"prompt": conversation(q, PROMPTS), "completion": CHAT[1:]} for q in queries]
        config = trl.SFTConfig(
            output_dir=str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=8, save_strategy="steps",
            save_steps=1, logging_steps=1, learning_rate=1e-2, **trainer_settings(model),
        )  # fmt: skip
        return trl.SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=lora(4, "CAUSAL_LM"),
        )  # fmt: skip

    return make


def test_a_checkpoint_that_a_kill_left_half_written_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    state = TrainerState(global_step=2, log_history=[{"loss": 1.0, "step": 1}])
    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state.save_to_json(str(folder / "trainer_state.json"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    file = tmp_path / "checkpoint-10/trainer_state.json"
    whole = file.read_text(encoding="utf-8")
    for length in range(len(whole)):
        file.write_text(whole[:length], encoding="utf-8")
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_training_that_was_killed_after_its_end_makes_no_further_update(sft: Callable, tmp_path: Path) -> None:
    whole, again = sft(0.6), sft(0.6)
    train_from(whole, None)
    assert whole.state.global_step == 2
    (tmp_path / "checkpoint-3").mkdir()  # killed while it was written
    train_from(again, last_checkpoint(tmp_path))
    assert again.state.global_step == 2
    before, after = (get_peft_model_state_dict(trainer.model) for trainer in (whole, again))
    assert all((before[name] == after[name]).all() for name in before)


def test_a_training_of_no_update_is_refused(sft: Callable, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_from(sft(0), None)
    assert stopped.value.code == 2 and "no update was made" in capsys.readouterr().err
