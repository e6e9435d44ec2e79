"""tools/with_judge.sh: one server for a whole command, restarted when it dies, never left behind.

Most tests put a small HTTP server where the script looks for vLLM: real processes, real signals, no weights. The last
one, where vLLM is installed, serves a small random model: what it says is nonsense, and every answer parses.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, lines
from endpoint import endpoint
from test_faults import write_candidates

from common.offline.tiny_model import tiny_policy
from common.policy import load_tokenizer

# Notes its number, its arguments and its rank in the log, starts a worker that outlives it, and answers as the critic.
FAKE_VLLM = f"""
import json, os, subprocess, sys, time
print(json.dumps({{"pid": os.getpid(), "argv": sys.argv[1:], "rank": os.environ.get("RANK")}}), flush=True)
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--model"] == "broken":
    sys.exit("no weights in broken")
subprocess.Popen(["sleep", "600"])
if flags["--model"] == "slow":
    time.sleep(600)
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from endpoint import critic, endpoint
with endpoint(critic, port=int(flags["--port"])) as served:
    served.dwell = 0.05
    time.sleep(600)
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> dict[str, str]:
    """The environment in which `python -m vllm.entrypoints.openai.api_server` is the fake."""
    package = tmp_path / "path/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()  # a folder without it gives way to a vLLM that is installed
    (package / "api_server.py").write_text(FAKE_VLLM)
    return {"PYTHONPATH": str(tmp_path / "path")}


class Wrapper:
    """tools/with_judge.sh at work, and what its server notes in the log."""

    def __init__(self, folder: Path, model: object, *command: object, signals: str = "usual", **environment: str):
        self.log = folder / "judge.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        usual = {"PORT": self.port, "JUDGE_LOG": self.log, "PYTHON": sys.executable}
        usual |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        words = [str(word).replace("PORT", str(self.port)) for word in command]
        interrupt = signal.SIG_IGN if signals == "ignored" else signal.SIG_DFL

        def set_signals() -> None:
            """A background job of a script ignores SIGINT, one of nohup SIGHUP; what pytest starts there would too."""
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

        self.process = subprocess.Popen(
            ["bash", "tools/with_judge.sh", str(model), *words],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in (usual | environment).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=set_signals,
        )

    def servers(self) -> list[dict]:
        """What each server noted, the newest last."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"pid"')]

    def group(self) -> list[int]:
        """What is alive of the newest server's process group."""
        return [number for number in psutil.pids() if alive(number, group=self.servers()[-1]["pid"])]

    def until_started(self) -> None:
        until(lambda: self.servers() and len(self.group()) == 2)

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def alive(number: int, group: int | None = None) -> bool:
    """Whether this process is alive, and of this group; a zombie is not."""
    try:
        in_group = group is None or os.getpgid(number) == group
        return in_group and psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# ---- with the fake --------------------------------------------------------------------------------------------------


def test_the_command_finds_a_server_and_gives_the_exit_code(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:PORT/v1/models').status); raise SystemExit(3)"
    environment = fake_vllm | {"CONCURRENCY": "8", "JUDGE_FLAGS": "--max-model-len 99 --seed 1", "RANK": "1"}
    environment |= {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    command = ["env", "-u", "http_proxy", sys.executable, "-c", ask]
    wrapper = Wrapper(tmp_path, "m", *command, **environment)
    code, out, err = wrapper.end()
    assert (code, out) == (3, "200\n") and err.count("\n") == 1 and str(wrapper.log) in err
    (server,) = wrapper.servers()
    assert not wrapper.group()
    flags = " ".join(server["argv"])
    assert "--generation-config vllm" in flags and "--max-num-seqs 8" in flags and server["rank"] is None
    assert "--enforce-eager --dtype bfloat16" in flags and flags.endswith("--max-model-len 99 --seed 1")


def test_the_judge_gets_its_share_of_the_gpu(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 81559\n")
    driver.chmod(0o755)
    environment = fake_vllm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JUDGE_MEMORY": "20"}
    wrapper = Wrapper(tmp_path, "m", "true", **environment)
    assert wrapper.end()[0] == 0
    flags = " ".join(wrapper.servers()[0]["argv"])
    assert "--gpu-memory-utilization 0.251" in flags and "--enforce-eager" not in flags  # 20 * 1024 / 81559


@pytest.mark.parametrize("model", ["slow", "m"], ids=["while_it_loads", "at_work"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_a_wrapper_that_is_stopped(
    tmp_path: Path, fake_vllm: dict[str, str], number: signal.Signals, model: str
) -> None:
    started = tmp_path / "started"
    wrapper = Wrapper(tmp_path, model, "bash", "-c", f"echo $$ >{started}; sleep 600; true", **fake_vllm)
    wrapper.until_started()
    if model == "m":
        until(lambda: count_lines(started))
    wrapper.process.send_signal(number)
    code, _, err = wrapper.end(20)
    assert code == (-number if number == signal.SIGKILL else 128 + number) and "Traceback" not in err
    until(lambda: not wrapper.group(), 10 if number == signal.SIGKILL else 0.1)
    if model == "m":
        until(lambda: not alive(int(started.read_text())), 10 if number == signal.SIGKILL else 0.1)


def test_a_ctrl_c_lets_the_step_say_how_to_go_on(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    run = tmp_path / "run"
    wrapper = Wrapper(tmp_path, "m", *curation(run, 400), **fake_vllm)
    until(lambda: count_lines(run / "judgements.jsonl") > 3)
    wrapper.process.send_signal(signal.SIGINT)
    code, _, err = wrapper.end(60)
    assert code == 130 and "run the same command again to go on" in err and "Traceback" not in err


def test_a_background_job_of_a_script_is_immune_to_ctrl_c(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    started = tmp_path / "started"
    command = ["bash", "-c", f"echo $$ >{started}; sleep 3"]
    wrapper = Wrapper(tmp_path, "m", *command, signals="ignored", **fake_vllm)
    until(lambda: count_lines(started))
    for process in (wrapper.process.pid, int(started.read_text())):
        os.kill(process, signal.SIGINT)
    assert wrapper.end()[0] == 0 and not wrapper.group()


def curation(run: Path, count: int) -> list[object]:
    """Step 1 over `count` greetings, none of them written here."""
    run.mkdir()
    candidates = write_candidates(run / "candidates_given.jsonl", count)
    flags = ["--samples", 0, "--candidates", candidates, "--concurrency", 4, "--base-url", "http://127.0.0.1:PORT/v1"]
    return [sys.executable, "01_curate_preferences.py", "--run", run, "--model", "m", *flags]


def test_a_server_that_dies_is_restarted_and_nothing_is_lost(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    run = tmp_path / "run"
    wrapper = Wrapper(tmp_path, "m", *curation(run, 60), **fake_vllm)
    for deaths, judged in ((1, 5), (2, 30)):
        until(lambda least=judged: count_lines(run / "judgements.jsonl") >= least)
        os.kill(wrapper.servers()[-1]["pid"], signal.SIGKILL)
        until(lambda least=deaths: len(wrapper.servers()) > least)
    code, _, err = wrapper.end()
    assert code == 0 and err.count("died and is restarted") == 2 and not wrapper.group()
    rows = lines(run / "judgements.jsonl")
    assert len(rows) == 60 and all(row["label"] in (0, 1) for row in rows)


def test_a_server_that_keeps_dying_ends_the_command(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    started = tmp_path / "started"
    wrapper = Wrapper(tmp_path, "m", "bash", "-c", f"echo $$ >{started}; sleep 600", **fake_vllm)
    until(lambda: count_lines(started))
    for deaths in range(1, 5):
        os.kill(wrapper.servers()[-1]["pid"], signal.SIGKILL)
        until(lambda least=deaths: len(wrapper.servers()) > least or wrapper.process.poll() is not None)
    code, _, err = wrapper.end()
    assert code == 2 and err.splitlines()[-1].startswith("error: the judge's server died 4 times")
    assert len(wrapper.servers()) == 4 and not alive(int(started.read_text()))


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    code, out, err = Wrapper(tmp_path, "broken", "echo", "at work", **fake_vllm).end()
    assert code == 2 and not out and "no weights in broken" in err and err.count("error: ") == 1
    assert err.splitlines()[-1].startswith("error: the judge's server did not start")


def test_a_port_that_is_taken_is_left_alone(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    with endpoint() as other:
        port = other.url.split(":")[2].split("/")[0]
        wrapper = Wrapper(tmp_path, "m", "true", **(fake_vllm | {"PORT": port}))
        code, out, err = wrapper.end()
    assert code == 2 and not out and err.count("\n") == 1 and f"--base-url {other.url}" in err
    assert not wrapper.log.exists()


def test_no_command_is_answered_with_the_usage() -> None:
    done = subprocess.run(["bash", "tools/with_judge.sh", "m"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bash tools/with_judge.sh MODEL COMMAND...")
    assert "JUDGE_MEMORY" in done.stderr and "pipefail" not in done.stderr


def test_steps_give_up_on_a_server_that_stays_away(tmp_path: Path, fake_vllm: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--port", str(port)],
        env=os.environ | fake_vllm,
        start_new_session=True,
    )
    until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    run = tmp_path / "run"
    command = [str(word).replace("PORT", str(port)) for word in [*curation(run, 60), "--wait", 1]]
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=environment)
    until(lambda: count_lines(run / "judgements.jsonl") > 3)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    _, err = process.communicate(timeout=60)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "did not come back within --wait 1 s" in line
    assert all(row["label"] in (0, 1) for row in lines(run / "judgements.jsonl"))


# ---- with vLLM ------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A random model with room for long prompts, which likes to end what it begins: strings, lists and objects."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(str(tiny_policy()))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # the first dimension is the same for every token, and favours these two alone
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        for sign, weight in (('"', 6.0), ("]", 3.0)):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(sign), 0] = weight
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def first_rows(folder: Path, name: str, count: int) -> Path:
    """A shipped data file, its first rows only."""
    rows = (ROOT / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vLLM is not installed; .ci/run installs its CPU build"
)
def test_steps_1_and_3_ask_a_real_vllm(judge: Path, tmp_path: Path) -> None:
    run, queries = tmp_path / "run", first_rows(tmp_path, "queries", 12)
    labelled = first_rows(tmp_path, "labelled", 240)
    usual = f"--run {run} --model {judge} --base-url http://127.0.0.1:PORT/v1 --concurrency 8 --queries {queries}"
    first = f"01_curate_preferences.py {usual} --policy {tiny_policy()} --bits 16 --samples 2 --max-tokens 24"
    third = f"03_refine_judge.py {usual} --rounds 2 --bank 13 --batch 6 --attacks 12 --labelled {labelled}"
    both = f"{sys.executable} {first} && {sys.executable} {third}"
    wrapper = Wrapper(tmp_path, judge, "bash", "-c", both, CONCURRENCY="8", JUDGE_FLAGS="--max-model-len 8192")
    code, out, err = wrapper.end(500)
    assert code == 0 and "Traceback" not in err and "died" not in err, out + err
    rows = lines(run / "judgements.jsonl")
    assert rows and all(row["label"] in (0, 1) and row["judge"]["verdict"] in (0, 1) for row in rows)
    assert not json.loads((run / "01_summary.json").read_text())["failures"]
    summary = json.loads((run / "03_summary.json").read_text())
    assert summary["ledger"]["outcomes"].keys() == {"ok"}
    assert summary["test"]["seed"]["failed"] == summary["test"]["final"]["failed"] == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", wrapper.port))
