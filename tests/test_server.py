"""--serve: a server of the script's own, started when it is needed, started again when it dies, never left behind.

The first tests put a stand-in where vLLM is imported from. The others, where vLLM is installed, serve a small random
model with it: what it says is nonsense, and every answer parses.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, lines
from endpoint import endpoint
from test_faults import write_candidates

from common.offline.tiny_model import tiny_policy
from common.policy import load_tokenizer

STAND_IN = f"""
import subprocess, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from endpoint import critic, endpoint
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--model"] == "broken":
    sys.exit("no weights in broken")
subprocess.Popen(["sleep", "600"])  # as vLLM's workers, which outlast what answers
time.sleep(0.5)
with endpoint(critic, port=int(flags["--port"])) as served:
    served.dwell = 0.05
    time.sleep(600)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """The environment in which `python -m vllm.entrypoints.openai.api_server` is the stand-in."""
    package = tmp_path / "path/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()  # a folder without it gives way to a vLLM that is installed
    (package / "api_server.py").write_text(STAND_IN)
    return {"PYTHONPATH": str(tmp_path / "path")}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(script: str, run: Path, port: int, *flags: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, script, "--run", run, "--serve", port, "--serve-flags", "", *flags]
    usual = {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | usual | environment,
    )  # fmt: skip


def curation(run: Path, port: int, count: int, *flags: object, **environment: str) -> subprocess.Popen:
    """Step 1 over some greetings that are given."""
    run.mkdir(exist_ok=True)
    given = write_candidates(run / "given.jsonl", count)
    flags = ("--samples", 0, "--candidates", given, "--concurrency", 4, *flags)
    return start("01_curate_preferences.py", run, port, *flags, **environment)


def finish(process: subprocess.Popen) -> str:
    """Wait for the end, which has to be a good one; what was said on stderr."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    return err


def until(what: Callable[[], object], seconds: float = 300) -> object:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def server_of(port: int) -> psutil.Process | None:
    """The process that serves this port."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "vllm.entrypoints.openai.api_server" in words and str(port) in words and "setpriv" not in words[0]:
            return process
    return None


def group(number: int) -> list[psutil.Process]:
    """What lives of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == number and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def judged(run: Path) -> int:
    path = run / "judgements.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# ---- a stand-in for vLLM --------------------------------------------------------------------------------------------


def test_it_is_started_for_the_first_answer_and_gone_at_the_end(
    tmp_path: Path, port: int, stand_in: dict[str, str]
) -> None:
    run = tmp_path / "run"
    process = curation(run, port, 20, "--serve-flags", "--seed 1 --max-model-len 99", **stand_in)
    served = until(lambda: server_of(port))
    assert served.cmdline()[-4:] == ["--seed", "1", "--max-model-len", "99"]
    number = os.getpgid(served.pid)
    assert number != os.getpgid(process.pid) and until(lambda: len(group(number)) == 2)
    assert "its log is" in finish(process)
    assert judged(run) == 20 and not group(number)
    again = curation(run, port, 20, **stand_in)
    assert "starting" not in finish(again)  # all was done: nothing to ask


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("early", [True, False], ids=["while_it_loads", "at_work"])
def test_a_script_that_is_stopped_takes_it_along(
    tmp_path: Path, port: int, stand_in: dict[str, str], sent: signal.Signals, early: bool
) -> None:
    run = tmp_path / "run"
    process = curation(run, port, 400, **stand_in)
    served = until(lambda: server_of(port))
    number = os.getpgid(served.pid)
    if not early:
        until(lambda: judged(run) > 3)
    process.send_signal(sent)
    process.communicate(timeout=60)
    if sent == signal.SIGKILL:  # vLLM ends its workers; the stand-in has none of its manners
        until(lambda: not server_of(port), 20)
        for left in group(number):
            left.kill()
        return
    assert process.returncode == 128 + sent
    assert not group(number)


def test_one_that_dies_is_started_again_and_nothing_is_lost(
    tmp_path: Path, port: int, stand_in: dict[str, str]
) -> None:
    run = tmp_path / "run"
    process = curation(run, port, 60, **stand_in)
    for done in (5, 30):
        until(lambda least=done: judged(run) >= least)
        served = server_of(port)
        number = os.getpgid(served.pid)
        served.kill()
        until(lambda old=number: not group(old))
    err = finish(process)
    assert err.count("is started again") == 2
    assert judged(run) == 60 and all(row["label"] in (0, 1) for row in lines(run / "judgements.jsonl"))


def test_one_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path, port: int, stand_in: dict[str, str]) -> None:
    process = curation(tmp_path / "run", port, 4, "--model", "broken", **stand_in)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "no weights in broken" in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: the server of --serve ended with code 1")


def test_an_endpoint_that_is_there_is_left_alone(tmp_path: Path, stand_in: dict[str, str]) -> None:
    with endpoint() as others:
        port = int(others.url.split(":")[2].split("/")[0])
        process = curation(tmp_path / "run", port, 4, **stand_in)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and f"--base-url {others.url}" in err and not server_of(port)
    process = curation(tmp_path / "run", port, 4, "--base-url", others.url, **stand_in)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "not allowed with argument --serve" in err and not server_of(port)


def test_an_endpoint_that_stays_away_stops_the_run(tmp_path: Path, port: int, stand_in: dict[str, str]) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--port", str(port)]
    served = subprocess.Popen(command, env=os.environ | stand_in, start_new_session=True)
    until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    given = write_candidates(tmp_path / "given.jsonl", 60)
    flags = ["--samples", 0, "--candidates", given, "--run", tmp_path / "run", "--wait", 1]
    url = f"http://127.0.0.1:{port}/v1"
    process = subprocess.Popen(
        [sys.executable, "01_curate_preferences.py", *map(str, flags), "--base-url", url], cwd=ROOT, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    until(lambda: judged(tmp_path / "run") > 3)
    os.killpg(served.pid, signal.SIGKILL)
    served.wait()
    _, err = process.communicate(timeout=60)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "did not come back within --wait 1 s" in line
    assert all(row["label"] in (0, 1) for row in lines(tmp_path / "run/judgements.jsonl"))


# ---- vLLM itself ----------------------------------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vLLM is not installed; .ci/run installs its CPU build"
)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for long prompts, which likes to end what it begins: strings, lists and objects."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(str(tiny_policy()))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=False, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():  # the first dimension is the same for every token, and weighs on these alone
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        for sign, weight in (('"', 6.0), ("]", 3.0)):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(sign), 0] = weight
    folder = tmp_path_factory.mktemp("judge") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Path]:
    """The shipped data, less of each."""
    found = {}
    for name, count in (("queries", 12), ("queries_heldout", 4), ("references", 60), ("labelled", 240)):
        rows = (ROOT / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("\n".join(rows) + "\n", encoding="utf-8")
    return found


def serving(judge: Path) -> list[object]:
    """Flags of a step that asks this model and writes with the tiny one."""
    return ["--model", judge, "--serve-flags", "--max-model-len 8192", "--policy", tiny_policy(), "--bits", 16]


@needs_vllm
def test_steps_1_3_and_5_ask_a_real_server(judge: Path, small: dict[str, Path], tmp_path: Path, port: int) -> None:
    run, usual = tmp_path / "run", serving(judge)
    written = ["--samples", 2, "--max-tokens", 24]
    finish(start("01_curate_preferences.py", run, port, *usual, *written, "--queries", small["queries"]))
    rows = lines(run / "judgements.jsonl")
    assert rows and all(row["label"] in (0, 1) and row["judge"]["verdict"] in (0, 1) for row in rows)
    first = json.loads((run / "01_summary.json").read_text())
    assert not first["failures"] and first["ledger"]["outcomes"] == {"ok": 4 * len(rows)}
    flags = ["--rounds", 2, "--bank", 13, "--batch", 6, "--attacks", 3, "--labelled", small["labelled"]]
    finish(start("03_refine_judge.py", run, port, *usual, *flags, "--queries", small["queries"]))
    third = json.loads((run / "03_summary.json").read_text())
    assert len(lines(run / "principles.jsonl")) >= 2 and third["ledger"]["outcomes"].keys() == {"ok"}
    assert third["test"]["seed"]["failed"] == third["test"]["final"]["failed"] == 0
    (run / "sft.jsonl").unlink()  # this judge accepts nothing
    flags = ["--samples", 1, "--max-tokens", 24, "--labelled", small["labelled"], "--queries", small["queries_heldout"]]
    finish(start("05_evaluate.py", run, port, *usual, *flags))
    fifth = json.loads((run / "05_summary.json").read_text())
    assert fifth["policies"]["base"]["unscored"] == 0 and fifth["ledger"]["outcomes"].keys() == {"ok"}
    assert fifth["evaluators"]["agents"]["failed"] == 0
    assert not server_of(port)


@needs_vllm
def test_grpo_goes_on_when_the_server_is_killed(judge: Path, small: dict[str, Path], tmp_path: Path, port: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sides = [
        {
            "prompt": [{"role": "user", "content": f"请只生成一条祝福语：{row['query']}"}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in lines(small["references"])
    ]
    (run / "sft.jsonl").write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in sides), encoding="utf-8")
    version = {"principles": ["读来通顺。"], "accepted": True, "version": 0}
    (run / "principles.jsonl").write_text(json.dumps(version, ensure_ascii=False) + "\n", encoding="utf-8")
    usual = [*serving(judge), "--engine", "hf"]
    finish(start("04_grpo.py", run, port, "--reward", "none", "--sft-epochs", 1, *usual))
    flags = ["--reward", "judge", "--steps", 3, "--queries", small["queries"], "--queries-per-step", 4]
    flags += ["--mini-batch", 4, "--samples", 4, "--micro-batch", 16, "--max-tokens", 16, "--watch-every", 0]
    process = start("04_grpo.py", run, port, *usual, *flags)
    rollouts = run / "rollouts_judge.jsonl"
    until(lambda: rollouts.is_file() and rollouts.read_bytes().count(b"\n") >= 16)
    served = server_of(port)
    number = os.getpgid(served.pid)
    served.kill()
    until(lambda: not group(number))
    assert "is started again" in finish(process)
    rows = lines(rollouts)
    assert Counter(row["step"] for row in rows) == {0: 16, 1: 16, 2: 16}
    assert all(row["reward"] in (0.0, 1.0) for row in rows)
    assert json.loads((run / "04_summary_judge.json").read_text())["failed_judgements"] == 0
    assert not server_of(port)


@needs_vllm
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_vllm_is_left(judge: Path, tmp_path: Path, port: int, sent: signal.Signals) -> None:
    run = tmp_path / "run"
    process = curation(run, port, 400, *serving(judge))
    until(lambda: judged(run))
    number = os.getpgid(server_of(port).pid)
    assert len(group(number)) >= 2
    process.send_signal(sent)
    process.communicate(timeout=90)
    until(lambda: not group(number), 90 if sent == signal.SIGKILL else 1)
