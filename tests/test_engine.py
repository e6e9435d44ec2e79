"""Step 4 with vLLM in the trainer's process: the rollouts are the policy's, and where they are not, the run stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script

from common.offline.tiny_model import LAYERS

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/run installs its CPU build")
REAL = os.environ.get("REAL_MODEL")  # a folder with pretrained weights
GAP = "sampling/sampling_logp_difference/mean"
SMALL = ["--queries-per-step", 8, "--mini-batch", 8, "--samples", 4, "--micro-batch", 32, "--max-tokens", 24]


def command(folder: Path, replaced: str, bits: int, *more: object) -> list[str]:
    flags = ["--offline", "--reward", "judge", "--engine", "vllm", "--watch-every", 2, "--watch-queries", 8]
    flags += ["--bits", bits, "--run", folder, *SMALL, *more]
    return [sys.executable, "tests/engine.py", replaced, *map(str, flags)]


def step_4(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=550)


def sft_run(folder: Path, rows: int, *flags: object) -> Path:
    """A run folder with a policy that has learnt from the first references."""
    folder.mkdir(parents=True)
    version = {"principles": ["读来通顺。"], "accepted": True, "version": 0}
    (folder / "principles.jsonl").write_text(json.dumps(version) + "\n", encoding="utf-8")
    with (folder / "sft.jsonl").open("w", encoding="utf-8") as file:
        for row in lines(ROOT / "data/references.jsonl")[:rows]:
            sides = {"prompt": [{"role": "user", "content": f"请只生成一条祝福语：{row['query']}"}],
                     "completion": [{"role": "assistant", "content": row["response"]}]}  # fmt: skip
            file.write(json.dumps(sides, ensure_ascii=False) + "\n")
    done = run_script("04_grpo.py", "--offline", "--run", folder, "--sft-epochs", 1, "--reward", "none", *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bits -> a run folder with an SFT policy."""
    return {bits: sft_run(tmp_path_factory.mktemp("sft") / "run", 96, "--bits", bits) for bits in (4, 16)}


@pytest.fixture
def folder(sft: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the 4-bit folder."""
    shutil.copytree(sft[4], tmp_path / "run")
    return tmp_path / "run"


def gaps(folder: Path) -> list[float]:
    return [row[GAP] for row in lines(folder / "metrics_judge.jsonl")]


def test_rollouts_from_the_dequantised_base_are_the_policys_also_when_resumed(folder: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    flags = (folder, "as_is", 4, "--steps", 5, "--save-every", 2)
    process = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = folder / "metrics_judge.jsonl", time.time() + 400
    while time.time() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = lines(metrics)[:2]
    done = step_4(*flags)
    assert done.returncode == 0, done.stderr
    assert lines(metrics)[:2] == before  # it went on from the checkpoint, not from the start
    assert [row["step"] for row in lines(metrics)] == [1, 2, 3, 4, 5] and max(gaps(folder)) <= 0.01
    assert json.loads(done.stdout.splitlines()[-1]) == {"base_unchanged": True}
    summary = json.loads((folder / "04_summary_judge.json").read_text())
    adapter = (folder / "policy_judge" / "adapter_model.safetensors").stat().st_size
    assert adapter < summary["sync"]["bytes"] <= 1.05 * adapter
    assert summary["logp_gap"]["most"] == max(gaps(folder))
    done = step_4(original, "original_base", 4, "--steps", 3, "--max-gap", 9)
    assert done.returncode == 0, done.stderr
    assert sum(gaps(folder)) / 5 <= 0.2 * sum(gaps(original)) / 3


def test_a_16_bit_policy_too(sft: dict[int, Path]) -> None:
    done = step_4(sft[16], "as_is", 16, "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert len(gaps(sft[16])) == 3 and max(gaps(sft[16])) <= 0.01


@pytest.mark.parametrize(
    ("injected", "told"),
    [
        ("never_sent", "the engine did not take the adapter"),
        ("sent_once", "the engine did not take the adapter"),
        ("original_base", "these rollouts are not the policy's"),
    ],
)
def test_an_engine_with_another_policy_stops_the_run(folder: Path, injected: str, told: str) -> None:
    done = step_4(folder, injected, 4, "--steps", 12, "--learning-rate", 5e-3, "--max-gap", 0.02)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "policy_judge").exists()
    if injected == "never_sent":
        assert not (folder / "metrics_judge.jsonl").exists()  # no update was made


@pytest.mark.skipif(not REAL, reason="REAL_MODEL names no folder with pretrained weights")
def test_real_weights_too_are_told_from_the_original_base(tmp_path: Path) -> None:
    folder = sft_run(tmp_path / "run", 32, "--bits", 4, "--policy", REAL)
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    few = ["--policy", REAL, "--queries-per-step", 4, "--mini-batch", 4, "--micro-batch", 8, "--watch-every", 0]
    done = step_4(folder, "as_is", 4, "--steps", 3, *few)
    assert done.returncode == 0, done.stderr
    print("gaps of real weights in 4 bits:", gaps(folder))
    done = step_4(original, "original_base", 4, "--steps", 3, *few)
    assert done.returncode == 2 and "these rollouts are not the policy's" in done.stderr, done.stderr


def engine(mode: str):
    """What tests/engine.py prints in this mode."""
    command = [sys.executable, "tests/engine.py", mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_engine_writes_for_the_base_and_for_every_adapter() -> None:
    base, adapter, again = engine("writer")
    assert len(base) == len(adapter) == 6 and all(base)
    assert base == again
    assert sum(a != b for a, b in zip(base, adapter, strict=True)) >= 5


def test_each_lora_module_reaches_the_engine() -> None:
    found = engine("modules")
    slept = "after sleep" in found  # sleep does nothing on a CPU, so there it is not tried
    assert len(found) == slept + LAYERS * 7 + 1  # layers and their matrices; the first once more
    for name, (gap, to_unperturbed) in found.items():
        assert gap < 0.25 * to_unperturbed, name
