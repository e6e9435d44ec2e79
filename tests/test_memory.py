"""The GPU's memory: the plan's terms, the GPU that is there, what fits on it, and the docs' table of that."""

import argparse
import importlib
import importlib.util
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from common import memory
from common.memory import GIB, QWEN_1B, SETTINGS, SHAPE, SHAPES
from common.policy import DEFAULT_POLICY

HERE, ELSEWHERE = "http://127.0.0.1:1/v1", "https://judge.example/v1"
TRAINING, GAPS = "trainer: activations and a tile of logits", "trainer: gaps in memory, a guess"


def arguments(*flags: object) -> argparse.Namespace:
    """Step 4's, from its own parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["04_grpo.py", *map(str, flags)])
        args = importlib.import_module("04_grpo").parse_args()
    args.policy = args.policy or DEFAULT_POLICY
    args.engine = args.engine or "vllm"
    return args


def plan_of(*flags: object) -> dict[str, float]:
    args = arguments(*flags)
    return memory.plan(args, args.policy)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A driver's nvidia-smi that knows GPU 0 alone, and says this of it; `-L` and queries without -i succeed."""

    def make(memory_of_gpu_0: str) -> None:
        script = tmp_path / "nvidia-smi"
        cases = f'*"-i 0 "*) echo "{memory_of_gpu_0}" ;; *-i*) echo "No devices were found"; exit 6 ;;'
        script.write_text(f'#!/bin/sh\ncase "$* " in {cases} esac\n')
        script.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    make("80900, 81559")
    return make


@pytest.fixture
def torch_with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 79.2 * GIB))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ---- the plan's terms -----------------------------------------------------------------------------------------------


def test_the_plan_counts_the_parameters_of_the_default_model(no_gpu: None) -> None:
    done = run_script("04_grpo.py", "--reward", "judge", "--plan")
    assert done.returncode == 0, done.stderr
    size = {line.split("GiB")[1].strip(): float(line.split()[0]) for line in done.stdout.splitlines()}
    assert size["rollouts: base in bf16"] == pytest.approx(2 * 7_615_283_200 / GIB, abs=0.06)  # but norms and biases
    adapter = size["trainer: adapter, its gradient and Adam's two moments, fp32"]
    assert adapter == pytest.approx(16 * 40_370_176 / GIB, abs=0.06)


def test_logits_are_made_a_tile_at_a_time() -> None:
    """Longer completions at the same length of a pass add none: there are no logits of a whole pass."""
    from trl.kernels import chunked_logprob

    assert chunked_logprob.TOKEN_CHUNK_SIZE == 4096
    args = arguments("--reward", "judge", "--micro-batch", 8)
    hidden, wide, layers, *_ = SHAPES[DEFAULT_POLICY]
    tokens = 8 * 768
    tile = 4 * (4096 * 32768 + tokens * hidden)
    activations = layers * tokens * hidden * 2 + tokens * (16 * hidden + 6 * wide) * 2 + 2 * hidden * wide
    parts = memory.plan(args, DEFAULT_POLICY)
    assert parts[TRAINING] * GIB == pytest.approx(activations + tile)
    assert tile / GIB == pytest.approx(0.58, abs=0.01)  # where 8 x 512 x 152064 logits would take 4.6


def test_gaps_between_tensors_grow_with_a_pass() -> None:
    few, many = (plan_of("--reward", "judge", "--micro-batch", n) for n in (8, 32))
    assert 0.9 <= few[GAPS] <= 1.1 and 3 <= many[GAPS] <= 4  # one to three GiB, say those who measured


@pytest.mark.parametrize("base", SHAPES)
def test_the_reward_model_has_no_lm_head(base: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, Qwen2Config

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            Qwen2Config(**dict(zip(SHAPE, SHAPES[base], strict=True)))
        )
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    in_bf16 = 2 * model.model.embed_tokens.weight.numel()
    parts = plan_of("--reward", "rm", "--policy", base, "--base-url", ELSEWHERE)
    adapter = parts["trainer: adapter of the reference"]
    assert parts["reward model"] * GIB == pytest.approx(linear * 0.5625 + in_bf16 + adapter * GIB)


def test_the_reward_model_has_the_bits_of_its_training(tmp_path: Path) -> None:
    four, sixteen = (plan_of("--reward", "rm", "--rm", tmp_path, "--bits", bits) for bits in (4, 16))
    more = 6.53e9 * (2 - 0.5625) / GIB
    assert four["reward model"] == sixteen["reward model"]
    assert sixteen["trainer: base"] - four["trainer: base"] == pytest.approx(more, abs=0.05)
    (tmp_path / "calibration.json").write_text('{"bits": 16}')
    in_16 = plan_of("--reward", "rm", "--rm", tmp_path)["reward model"]
    assert in_16 - four["reward model"] == pytest.approx(more, abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_wider_than_the_hidden_size_are_counted(tied: bool, tmp_path: Path) -> None:
    """Qwen3 has such; its name for them is in its configuration."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = dict(zip(SHAPE, (1024, 3072, 28, 16, 8, 151936, tied), strict=True))
    config = Qwen3Config(**sizes, head_dim=128)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts = plan_of("--reward", "judge", "--policy", tmp_path, "--base-url", ELSEWHERE)
    assert parts["rollouts: base in bf16"] * GIB == pytest.approx(2 * model.num_parameters(), rel=0.001)


@pytest.mark.parametrize(
    ("flags", "judge"),
    [
        (["--reward", "judge"], 30.75),  # and CUDA of its process
        (["--reward", "judge", "--judge-memory", 20], 20.75),
        (["--reward", "judge", "--base-url", ELSEWHERE], None),
        (["--reward", "rm"], 30.75),  # for the watch
        (["--reward", "rm", "--watch-every", 0], None),
        (["--reward", "judge", "--watch-every", 0], 30.75),
        (["--reward", "none"], None),
    ],
)
def test_memory_is_set_aside_for_a_judge_that_is_asked_here(flags: list, judge: float | None) -> None:
    assert plan_of(*flags).get("judge's server") == judge


def test_sft_writes_nothing_and_has_its_own_passes() -> None:
    small, large = (plan_of("--reward", "none", "--sft-batch-size", n) for n in (4, 16))
    assert not memory.rollouts(large) and "trainer: adapter of the reference" not in large
    assert large[TRAINING] > 2 * small[TRAINING]


def test_writing_takes_turns_with_training_where_it_can() -> None:
    peaks, sizes = [], []
    for flags in ([], ["--sleep"], ["--engine", "hf"]):
        args = arguments("--reward", "rm", *flags)
        sizes.append(memory.plan(args, DEFAULT_POLICY))
        peaks.append(memory.peak(args, sizes[-1]))
    assert peaks[0] - peaks[1] == pytest.approx(sizes[0][TRAINING], abs=0.01)
    # A GiB of the engine stays when it sleeps.
    rest = sum(size for name, size in sizes[1].items() if name not in (TRAINING, "reward model: a pass"))
    assert peaks[1] == pytest.approx(rest) and peaks[2] < peaks[1] - 10


# ---- the GPU that is there ------------------------------------------------------------------------------------------


def test_what_others_use_is_not_planned_with(nvidia_smi: Callable, capsys: pytest.CaptureFixture) -> None:
    args = arguments("--reward", "judge", "--base-url", ELSEWHERE)
    memory.show_plan(args, DEFAULT_POLICY)
    assert "of 79.0 GiB (" in capsys.readouterr().out  # less than a GiB is the driver's own
    nvidia_smi("22528, 81559")
    with pytest.raises(SystemExit):
        memory.show_plan(args, DEFAULT_POLICY)
    out, err = capsys.readouterr()
    assert "of 22.0 GiB that are free, 57.6 are in use" in out
    assert err.count("\n") == 1 and "with --engine hf it does" in err


def test_a_judge_that_runs_already_is_among_what_is_in_use(nvidia_smi: Callable) -> None:
    nvidia_smi("49000, 81559")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        args = arguments("--reward", "judge", "--base-url", url)
        assert memory.check_fit(args, DEFAULT_POLICY)[0]  # it would be started beside the others
        server.listen()
        assert not memory.check_fit(args, DEFAULT_POLICY)[0]
        args.gpu_memory = 48  # a plan for another card
        assert memory.check_fit(args, DEFAULT_POLICY)[0]


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_a_gpu_that_is_hidden_is_none(visible: str, nvidia_smi: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert memory.gpu_gib() is None


@pytest.mark.parametrize("visible", ["7", "7,0", "GPU-0123"])
@pytest.mark.parametrize("script", ["04_grpo.py", "tools/check.py"])
def test_a_gpu_that_is_not_there_ends_in_one_line(
    script: str, visible: str, nvidia_smi: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = run_script(script, *(["--reward", "judge", "--plan"] if script == "04_grpo.py" else []))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert f"CUDA_VISIBLE_DEVICES={visible.split(',')[0]}: nvidia-smi knows no such GPU" in done.stderr


@pytest.mark.parametrize("answer", ["", "[N/A], [N/A]", "Failed to initialize NVML: Driver/library version mismatch"])
def test_a_driver_that_tells_nothing_is_no_gpu(answer: str, nvidia_smi: Callable) -> None:
    nvidia_smi(answer)
    assert memory.gpu_gib() is None


def test_a_driver_too_old_for_torch_ends_in_one_line(
    nvidia_smi: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        memory.check_gpu(arguments("--reward", "judge"), DEFAULT_POLICY)
    assert "torch cannot use the GPU" in capsys.readouterr().err
    memory.check_gpu(arguments("--reward", "judge", "--offline"), DEFAULT_POLICY)  # asks for none


@pytest.mark.parametrize(
    ("cuda", "available", "capability", "remedy"),
    [(None, False, None, "requirements.txt"), ("13.0", False, None, "newer driver"), ("13.0", True, (7, 5), "Ampere"),
     ("13.0", True, (8, 9), "")],
)  # fmt: skip
def test_the_checks_say_why_torch_cannot_use_a_gpu(
    nvidia_smi: Callable, monkeypatch: pytest.MonkeyPatch, cuda: str, available: bool, capability: tuple, remedy: str
) -> None:
    import torch

    from tools import check

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    said, finding = check.gpu(argparse.Namespace())
    assert (remedy in said and bool(said) == bool(remedy)) and finding


def test_a_step_that_has_no_room_ends_before_anything_is_loaded(
    nvidia_smi: Callable, torch_with_gpu: None, capsys: pytest.CaptureFixture
) -> None:
    nvidia_smi("23000, 24564")
    with pytest.raises(SystemExit):
        memory.check_gpu(arguments("--reward", "judge", "--base-url", ELSEWHERE), DEFAULT_POLICY)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "with --engine hf it does" in err
    memory.check_gpu(arguments("--reward", "judge", "--base-url", ELSEWHERE, "--engine", "hf"), DEFAULT_POLICY)


def test_the_engines_share_is_of_the_whole_card_whatever_is_planned_for(
    nvidia_smi: Callable, torch_with_gpu: None
) -> None:
    plain, planned = (arguments("--reward", "judge", *flags) for flags in ([], ["--gpu-memory", 40]))
    nvidia_smi("40000, 81559")
    assert memory.engine_share(plain, DEFAULT_POLICY) == memory.engine_share(planned, DEFAULT_POLICY)
    parts = memory.plan(plain, DEFAULT_POLICY)
    assert memory.engine_share(plain, DEFAULT_POLICY) == pytest.approx(memory.rollouts(parts) / 79.2)


# ---- what fits ------------------------------------------------------------------------------------------------------


def rows_of_the_table() -> list[list[str]]:
    """The cells of each row of the table in the docs."""
    text = (ROOT / "docs/more_gpus.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| \d+ GB \|.*", text, re.M)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_in_the_docs_is_what_the_code_computes(no_gpu: None) -> None:
    done = run_script("tools/check.py", "--table")
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs/more_gpus.md").read_text(encoding="utf-8")
    first = rows_of_the_table()[0]
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert first[-1] in text and f"`{first[-2]}`" in text


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: f"{row[0]}, judge {row[1]}")
def test_each_row_of_the_table_is_printed_by_the_plan(row: list[str], capsys: pytest.CaptureFixture) -> None:
    """And the plain settings are, for a smaller card, refused with flags that fit."""
    card, judge, policy, bits, flags, peak = row
    place = ["--gpu-memory", card.split()[0], "--base-url", HERE if judge.startswith("on it") else ELSEWHERE]
    memory_of_judge = ["--judge-memory", judge.split()[2]] if judge.startswith("on it") else []
    rest = [*flags.split(), *memory_of_judge, "--policy", f"Qwen/{policy}", "--bits", bits]
    memory.show_plan(arguments("--reward", "rm", "--plan", *place, *rest), f"Qwen/{policy}")
    assert f"{peak}  at the peak" in capsys.readouterr().out

    plain = arguments("--reward", "rm", "--plan", *place)
    remedy, _ = memory.check_fit(plain, DEFAULT_POLICY)
    assert bool(remedy) == (memory.peak(plain, memory.plan(plain, DEFAULT_POLICY)) > int(card.split()[0]))
    if remedy:
        named = re.search("with (.*) it does", remedy).group(1).split()
        fitting = arguments("--reward", "rm", "--plan", *place, *named)
        assert not memory.check_fit(fitting, fitting.policy)[0], named


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--gpu-memory", 67], "with --sleep it does"),
        (["--gpu-memory", 48], "with --engine hf --judge-memory 26 it does"),
        (["--gpu-memory", 20], "with --base-url ADDRESS (a judge elsewhere) --engine hf it does"),
        (["--gpu-memory", 20, "--base-url", ELSEWHERE], "with --engine hf it does"),
        (["--gpu-memory", 12, "--base-url", ELSEWHERE, "--policy", QWEN_1B], "with --sleep it does"),
        (["--gpu-memory", 3], "use a larger GPU"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_flags_that_would(flags: list, remedy: str, no_gpu: None) -> None:
    done = run_script("04_grpo.py", "--reward", "rm", "--plan", *flags)
    assert done.returncode == 2 and remedy in done.stderr and done.stderr.count("\n") == 1


def test_the_settings_are_in_order() -> None:
    """A smaller policy comes after a larger one, so that the first that fits is the best."""
    sizes = [SHAPES[settings["policy"]][0] for settings in SETTINGS]
    assert sizes == sorted(sizes, reverse=True)


# ---- bench/memory.py ------------------------------------------------------------------------------------------------


def test_speeds_are_of_whole_rollouts_and_leave_the_first_out() -> None:
    """128 completions of 100 tokens: written in 4 s, trained in two updates of 5 s."""
    from bench.memory import of_the_last_rollout

    first = {"seconds/sync": 9.0, "seconds/generate": 90.0, "seconds/reward": 9.0, "completions/mean_length": 7.0}
    last = {"seconds/sync": 0.5, "seconds/generate": 4.0, "seconds/reward": 1.5, "completions/mean_length": 100.0}
    steps = [first | {"step_time": 200.0}, {"step_time": 50.0}, last | {"step_time": 11.0}, {"step_time": 5.0}]
    assert of_the_last_rollout(steps, 128) == {
        "sync": 0.5, "generate": 4.0, "reward": 1.5, "train": 10.0, "written": 3200.0, "trained": 1280.0
    }  # fmt: skip


def test_the_peak_is_the_devices_without_what_others_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.memory import Device

    free = iter([60, 20, 50])
    seen = threading.Event()

    def mem_get_info() -> tuple[float, float]:
        left = next(free, None)
        if left is None:
            seen.set()
        return (left or 50) * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    with Device(others=10) as device:
        assert seen.wait(5)
    assert device.most == 50


def test_a_random_model_writes_texts() -> None:
    from bench.memory import random_tokenizer

    tokenizer = random_tokenizer(3000)
    assert len(tokenizer) == 3000
    text = tokenizer.decode(range(2500, 3000))
    assert len(text) == 1000 and tokenizer(text)["input_ids"] == list(range(2500, 3000))  # and a judge reads as many


def test_without_a_gpu_each_part_of_the_first_hour_says_so(no_gpu: None) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    for part in ("engine", "bf16", "sleep", "original", "memory"):
        done = subprocess.run(["bash", "bench/gpu.sh", part], cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        assert done.returncode == 0 and len(lines) == 2 and lines[0] == f"== {part}", done.stderr
        assert "not installed" in lines[1] or "no CUDA GPU" in lines[1]
    done = subprocess.run(["bash", "bench/gpu.sh", "all"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "bash bench/gpu.sh PART" in done.stderr
