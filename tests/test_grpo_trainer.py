"""Step 4's trainer: the order of queries, the passes, the gap to the engine, what the hub is asked."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.grpo_trainer import GAP_NOISE, PASS, gap_limit, grpo_trainer, pass_sizes
from common.offline.tiny_model import tiny_policy
from common.policy import load_policy, lora, save_adapter, silence_libraries


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory):
    """A trainer of 8 queries, 4 a step, on the tiny model with an adapter that is not zero; it never trains."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import GRPOConfig

    silence_libraries()
    model, tokenizer = load_policy(str(tiny_policy()), 16)
    model = get_peft_model(model, lora(8, "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            part.data = torch.randn(part.shape, generator=generator) * 0.1
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trainer")), per_device_train_batch_size=8, num_generations=2, seed=3,
        steps_per_generation=1, gradient_accumulation_steps=1, beta=0.05, use_cpu=True, report_to=[], bf16=False,
        cast_lm_head_to_fp32=True,
    )  # fmt: skip
    queries = [{"prompt": [{"role": "user", "content": f"祝福语{n}"}], "query": f"祝福语{n}"} for n in range(8)]
    parts = {"train_dataset": Dataset.from_list(queries), "processing_class": tokenizer}

    async def rewards(completions: list, **rest: object) -> list[float]:
        return [0.0] * len(completions)

    return grpo_trainer(Namespace(max_gap=0.1), model, rewards, config, **parts)


def test_each_epoch_has_an_order_of_its_own_which_a_resumed_run_draws_too(trainer) -> None:
    def order(sampler, epoch: int) -> list[int]:
        sampler.set_epoch(epoch)
        return list(sampler)

    unbroken, resumed = trainer._get_train_sampler(), trainer._get_train_sampler()
    orders = [order(unbroken, epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert order(resumed, 2) == orders[2]  # without having drawn the epochs before
    assert all(sorted(set(drawn)) == list(range(8)) for drawn in orders)


PROMPT, COMPLETION = 12, 20  # columns


def some_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of more rows than a pass holds, four in turn with one prompt; prompts of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = PASS + 5
    ids = torch.randint(5, 300, (rows, PROMPT + COMPLETION), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        ids[row, :PROMPT] = ids[row - row % 4, :PROMPT]
        mask[row, PROMPT - 3 - row // 4 % 7 : PROMPT + 1 + row % 17] = 1
    return ids, mask


@pytest.mark.parametrize("batch_size", [None, 3, 100])
def test_a_pass_cut_to_its_longest_row_computes_the_same(trainer, batch_size: int | None) -> None:
    from trl import GRPOTrainer

    ids, mask = some_rows()
    rows, prompt, completion = len(ids), PROMPT, COMPLETION
    with torch.no_grad():
        ours = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, completion, batch_size=batch_size, compute_entropy=True
        )
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, mask, completion, compute_entropy=True
        )
    written = mask[:, prompt:].bool()
    for mine, stock in zip(ours[:2], theirs[:2], strict=True):
        assert mine.shape == stock.shape == (rows, completion)
        assert torch.allclose(mine[written], stock[written], atol=1e-4)
        assert stock[written].abs().mean() > 0.1  # or it would prove nothing


def test_a_pass_is_no_wider_than_its_rows(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    forward = trainer.model.forward

    def counting(*inputs, **options):
        widths.append(tuple(options["input_ids"].shape))
        return forward(*inputs, **options)

    monkeypatch.setattr(trainer.model, "forward", counting)
    ids, mask = torch.full((64, 40), 7), torch.zeros(64, 40, dtype=torch.long)
    mask[:32, 10:26], mask[32:, 15:23] = 1, 1
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 20)
    assert widths == [(32, 4), (32, 7)]  # a prompt's last token and its completion


def test_a_base_that_keeps_more_than_keys_and_values_gets_whole_rows(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = some_rows()
    with torch.no_grad():
        usual = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)[0]
        monkeypatch.setattr("transformers.cache_utils.DynamicLayer", object)  # no layer is one of these
        whole = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)[0]
    written = mask[:, PROMPT:].bool()
    assert torch.allclose(usual[written], whole[written], atol=1e-4) and not torch.equal(usual, whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_trl(trainer, monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    from trl import GRPOTrainer

    ids, mask = some_rows()
    monkeypatch.setattr(trainer.args, "gradient_checkpointing", checkpointing)
    parts = [part for name, part in trainer.model.named_parameters() if "lora" in name and ".default." in name]
    for part in parts:
        monkeypatch.setattr(part, "requires_grad", True)
    found = []
    for function in (type(trainer), GRPOTrainer):
        trainer.model.zero_grad()
        logps = function._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, COMPLETION)[0]
        logps[mask[:, PROMPT:].bool()].sum().backward()
        found.append([part.grad.clone() for part in parts])
    trainer.model.zero_grad()
    for mine, stock in zip(*found, strict=True):
        assert torch.allclose(mine, stock, rtol=1e-3, atol=1e-3 * float(stock.abs().max()))
        assert stock.abs().max() > 0


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([], []),
        ([7, 7, 7, 7, 7], [4, 1]),  # no more rows than asked for
        ([5, 6, 7, 8], [4]),  # 6 tokens of padding are fewer than 10
        ([5, 6, 7, 12, 12], [3, 2]),  # 18 would be more
        ([5, 90], [1, 1]),
    ],
)
def test_a_long_row_does_not_widen_a_pass_of_short_ones(lengths: list[int], sizes: list[int]) -> None:
    assert pass_sizes(lengths, 4, 10) == sizes


def test_the_batches_of_an_update_hold_rows_of_like_length(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [9, 2, 8, 1, 7, 3, 6, 4]  # two updates of two batches of two rows

    def rows(first: int, last: int) -> dict:
        mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths[first:last]])
        own = {"prompt_mask": torch.ones(last - first, 3), "completion_mask": mask, "advantages": mask.sum(1) * 1.0}
        return own | {"num_items_in_batch": torch.tensor(40), "ref_per_token_logps": None}

    def prepare(self, inputs):
        self._buffered_inputs = self._buffered_inputs or [rows(at, at + 2) for at in (0, 2, 4, 6)]
        return self._buffered_inputs[self._step % 4]

    monkeypatch.setattr(type(trainer).__mro__[1], "_prepare_inputs", prepare)
    monkeypatch.setattr(trainer, "_buffered_inputs", None)
    monkeypatch.setattr(trainer, "_step", 0)
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 2)
    monkeypatch.setattr(trainer.args, "steps_per_generation", 4)
    seen = []
    for step in range(4):
        trainer._step = step
        batch = trainer._prepare_inputs([])
        assert batch["completion_mask"].sum(1).tolist() == batch["advantages"].tolist()
        assert batch["num_items_in_batch"] == 40 and batch["ref_per_token_logps"] is None
        seen.append(batch["advantages"].tolist())
    assert seen == [[1, 2], [8, 9], [3, 4], [6, 7]]


@pytest.mark.parametrize(
    ("before", "limit"),
    [
        ([], 0.1),  # nothing is known yet but the cap
        ([0.03, 0.03], 0.1),
        ([0.03, 0.03, 0.03], 0.075),
        ([0.03, 0.9, 0.03], 0.075),  # one wild step moves no median
        ([0.06, 0.06, 0.06], 0.1),  # the cap holds
        ([1e-6, 1e-6, 1e-6], GAP_NOISE),  # fp32: rounding alone never stops a run
    ],
)
def test_the_limit_of_the_gap_follows_the_first_steps(before: list[float], limit: float) -> None:
    assert gap_limit(before, 0.1) == pytest.approx(limit)


def test_saving_an_adapter_asks_the_hub_nothing(trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import save_and_load

    def asked(*args: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", asked)
    monkeypatch.setattr(trainer.model.peft_config["default"], "base_model_name_or_path", "somebody/a-model")
    monkeypatch.setattr(trainer.model.get_base_model().config, "_name_or_path", "somebody/a-model", raising=False)
    save_adapter(trainer.model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 8


def test_the_seed_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from common import engine

    class LLM:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=None))
    served = engine.engine_class(str(tiny_policy()), 16, 16, seed=7)(seed=0).options
    assert served["seed"] == 7 and served["hf_overrides"] == {"head_dtype": "float32"}
