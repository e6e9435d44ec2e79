"""Step 4 with vLLM in the trainer's process: the rollouts are the policy's, and where they are not, the run stops."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script
from test_processes import LAUNCH

from common.engine import rollout_base
from common.offline.tiny_model import tiny_policy

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/run installs its CPU build")
GAP = "sampling/sampling_logp_difference/mean"
SMALL = ["--queries-per-step", 8, "--mini-batch", 8, "--samples", 4, "--micro-batch", 32, "--max-tokens", 24]


def command(folder: Path, exchanged: str, bits: int, *more: object) -> list[str]:
    flags = ["--offline", "--reward", "judge", "--engine", "vllm", "--watch-every", 2, "--watch-queries", 8]
    flags += ["--bits", bits, "--run", folder, *SMALL, *more]
    return [sys.executable, "tests/engine.py", exchanged, *map(str, flags)]


def step_4(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=550)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bits -> a run folder with an SFT policy."""
    rows = (ROOT / "data/references.jsonl").read_text(encoding="utf-8").splitlines()[:96]
    folders = {}
    for bits in (4, 16):
        folders[bits] = folder = tmp_path_factory.mktemp("sft") / "run"
        folder.mkdir()
        version = {"principles": ["读来通顺。"], "accepted": True, "version": 0}
        (folder / "principles.jsonl").write_text(json.dumps(version) + "\n", encoding="utf-8")
        with (folder / "sft.jsonl").open("w", encoding="utf-8") as file:
            for row in map(json.loads, rows):
                sides = {"prompt": [{"role": "user", "content": f"请只生成一条祝福语：{row['query']}"}],
                         "completion": [{"role": "assistant", "content": row["response"]}]}  # fmt: skip
                file.write(json.dumps(sides, ensure_ascii=False) + "\n")
        flags = ["--offline", "--run", folder, "--bits", bits, "--sft-epochs", 1, "--reward", "none"]
        done = run_script("04_grpo.py", *flags)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def folder(sft: dict[int, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the 4-bit folder."""
    shutil.copytree(sft[4], tmp_path / "run")
    return tmp_path / "run"


def gaps(folder: Path) -> list[float]:
    return [row[GAP] for row in lines(folder / "metrics_judge.jsonl")]


def test_rollouts_from_the_dequantised_base_are_the_policys(folder: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    done = step_4(folder, "as_is", 4, "--steps", 4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"base_unchanged": True}
    assert len(gaps(folder)) == 4 and max(gaps(folder)) <= 0.01
    summary = json.loads((folder / "04_summary_judge.json").read_text())
    adapter = (folder / "policy_judge" / "adapter_model.safetensors").stat().st_size
    assert adapter < summary["sync"]["bytes"] <= 1.05 * adapter
    assert summary["logp_gap"]["most"] == max(gaps(folder))
    done = step_4(original, "original_base", 4, "--steps", 4, "--max-gap", 9)
    assert done.returncode == 0, done.stderr
    assert sum(gaps(folder)) <= 0.2 * sum(gaps(original))


def test_a_16_bit_policy_too(sft: dict[int, Path]) -> None:
    done = step_4(sft[16], "as_is", 16, "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert len(gaps(sft[16])) == 3 and max(gaps(sft[16])) <= 0.01


@pytest.mark.parametrize("injected", ["never_sent", "sent_once"])
def test_an_adapter_that_does_not_reach_the_engine_stops_the_run(folder: Path, injected: str) -> None:
    done = step_4(folder, injected, 4, "--steps", 12, "--learning-rate", 5e-3)
    assert done.returncode == 2, done.stderr
    assert "these rollouts are not the policy's" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "policy_judge").exists()
    if injected == "never_sent":
        assert not (folder / "metrics_judge.jsonl").exists()  # no update was made


def test_killed_and_resumed_the_rollouts_are_still_the_policys(folder: Path) -> None:
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


# ---- a vLLM server that writes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen]]:
    """(URL, process) of a server of the dequantised base, started with the command that step 4 prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    flags = ["--offline", "--reward", "judge", "--bits", 4, "--run", tmp_path_factory.mktemp("none")]
    told = run_script("04_grpo.py", *flags, "--rollout-server", url)
    assert told.returncode == 2 and "no vLLM server answers" in told.stderr
    *variables, words = told.stderr.partition("start: ")[2].rstrip(".\n").partition("vllm serve ")
    assert rollout_base(str(tiny_policy()), 4) in words
    told = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words.split(), "--enforce-eager"]
    environment = dict(word.split("=") for word in variables[0].split()) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    process = subprocess.Popen(
        [*told, "--max-model-len", "400"], stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while "startup complete" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert process.poll() is None, log.read_text()[-3000:]
    yield url, process
    os.killpg(process.pid, signal.SIGKILL)


def test_a_server_writes_as_the_policy_for_two_processes(folder: Path, server: tuple) -> None:
    flags = [*SMALL, "--offline", "--bits", "4", "--reward", "judge", "--watch-every", "0", "--steps", "3"]
    flags += ["--mini-batch", "8", "--micro-batch", "16", "--run", folder, "--rollout-server", server[0]]
    done = subprocess.run(
        [sys.executable, *LAUNCH, "2", "04_grpo.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
        timeout=550, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(gaps(folder)) == 3 and max(gaps(folder)) <= 0.01
    rows = lines(folder / "rollouts_judge.jsonl")
    assert Counter(row["step"] for row in rows) == {0: 32, 1: 32, 2: 32}
    assert set(Counter((row["step"], row["query"]) for row in rows).values()) == {4}
    assert not list(folder.glob("adapter-*"))


def test_a_server_that_is_gone_ends_the_run_in_one_line(folder: Path, server: tuple) -> None:
    """The last test that uses it."""
    process = subprocess.Popen(
        command(folder, "as_is", 4, "--steps", 40, "--rollout-server", server[0]), cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (folder / "metrics_judge.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(server[1].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if "error: " in line]  # the bar is drawn after it
    assert "is gone" in line and "goes on at its last checkpoint" in line


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
    assert len(found) == 1 + 4 * 7 + 1  # after sleep; layers and their matrices; the first once more
    for name, (gap, to_unperturbed) in found.items():
        assert gap < 0.25 * to_unperturbed, name
