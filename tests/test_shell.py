"""The shell files: clean under shellcheck, free of what bash 3.2 lacks; and run.sh, which obeys the checks it runs."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A Mac has bash 3.2, and neither setsid nor sha256sum.
NEWER_BASH = (
    r"wait -n|declare -[Ag]|local -[nA]|mapfile|readarray|\$\{\w+(\^|,,|@)|&>>|\|&|\bcoproc\b|BASHPID|EPOCH"
    r"|setsid|sha256sum"
)
UNGUARDED_ARRAY = r'(?<!\+)"\$\{\w+\[@\]\}"'  # an error under `set -u` where the array is empty

# Notes what it is asked to run, and ends with the exit code that FAILS names for it. Only the judge's server is real.
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, sys
script = sys.argv[1]
if script == "-c" or "vllm.entrypoints.openai.api_server" in sys.argv:
    os.execv(sys.executable, sys.argv)
print(json.dumps(sys.argv[1:]), file=open("asked", "a"))
if "--choose" in sys.argv:
    print("--policy small --bits 4\\n--engine hf\\n--micro-batch 4 --sleep\\n26")
fails = json.loads(os.environ.get("FAILS", "{{}}"))
sys.exit(fails.get(script, 0))
"""
FAKE_VLLM = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
print(sys.argv, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


def shell_files() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {name for name in tracked.stdout.splitlines() if name.endswith(".sh")}
    return [ROOT / name for name in sorted(names | {"run.sh", ".ci/run", "tools/with_judge.sh", "bench/gpu.sh"})]


def test_shell_files_are_clean_under_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *shell_files()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", shell_files(), ids=lambda path: path.name)
def test_shell_files_need_no_newer_bash(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert not re.findall(NEWER_BASH, code) and not re.findall(UNGUARDED_ARRAY, code)


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """run.sh beside a Python and a pip that only note what they are asked, on a machine with a GPU."""
    for name in ("run.sh", "tools/with_judge.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path / "path/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    programs = {"python": FAKE_PYTHON, "pip": '#!/bin/sh\necho "$@" >>installed\n'}
    programs["nvidia-smi"] = "#!/bin/sh\necho 81559\n"
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


def asked(shell: Path, code: int, *flags: str, gpu: bool = True, **fails: int) -> list[list[str]]:
    """Run run.sh, which has to end with this code; what Python was asked to run."""
    environment = os.environ | {"FAILS": json.dumps(fails), "PYTHONPATH": str(shell / "path")}
    if gpu:
        environment["PATH"] = f"{shell / '.venv/bin'}:{os.environ['PATH']}"
    (shell / "asked").unlink(missing_ok=True)
    done = subprocess.run(["bash", "run.sh", *flags], cwd=shell, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in (shell / "asked").read_text().splitlines()]


def test_the_paper_run_is_checked_before_its_first_step(shell: Path) -> None:
    assert asked(shell, 2, "--paper", "--run", "x", **{"tools/check.py": 2}) == [["tools/check.py", "--run", "x"]]


def port_8000_answers() -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", 8000))


@pytest.mark.skipif(port_8000_answers(), reason="something answers on port 8000 of this machine")
@pytest.mark.parametrize("mode", [["--paper"], []])
def test_a_run_on_a_gpu_starts_one_judge_around_all_steps(shell: Path, mode: list[str]) -> None:
    flags = ["--model", "first", "--model=m", "--concurrency", "8"]
    steps = asked(shell, 0, *mode, *flags)
    if mode:
        assert steps.pop(0) == ["tools/check.py", *flags]
    # Before the server and, with what it has left, after it.
    choice = ["tools/check.py", "--choose", *flags]
    assert steps[:2] == [choice, choice] and len(steps) == 9
    assert all(step[-5:] == flags and "--offline" not in step for step in steps[2:])
    (server,) = (shell / "outputs/judge.log").read_text().splitlines()
    assert "'--model', 'm'" in server and "'--max-num-seqs', '8'" in server and "'--port', '8000'" in server
    assert "'--gpu-memory-utilization', '0.326'" in server  # 26 * 1024 / 81559


def test_a_server_that_answers_already_is_the_judge(shell: Path) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", 8000))
        except OSError:
            pytest.skip("port 8000 of this machine is taken")
        server.listen()
        choice, *steps = asked(shell, 0)
    assert choice == ["tools/check.py", "--choose"] and len(steps) == 7 and not (shell / "outputs/judge.log").exists()


def test_the_paper_run_with_an_endpoint_starts_no_judge(shell: Path) -> None:
    flags = ["--base-url", "https://judge.example/v1"]
    check, choice, *steps = asked(shell, 0, "--paper", *flags)
    assert check == ["tools/check.py", *flags] and choice == ["tools/check.py", "--choose", *flags] and len(steps) == 7
    assert all(step[-2:] == flags for step in steps) and not (shell / "outputs").exists()


def test_every_step_gets_those_of_the_chosen_settings_that_it_knows(shell: Path) -> None:
    _, *steps = asked(shell, 0, "--policy", "mine", "--base-url", "http://127.0.0.1:1/v1")
    for step in steps:
        assert step.index("small") < step.index("mine")  # the command line's flags win
        assert ("--engine" in step) == (step[0][:2] in ("01", "04", "05"))
        assert ("--sleep" in step and "--micro-batch" in step) == step[0].startswith("04")


def test_a_gpu_without_room_stops_before_the_first_step(shell: Path) -> None:
    assert len(asked(shell, 2, **{"tools/check.py": 2})) == 1


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_gpu_is_not_used(shell: Path, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    steps = asked(shell, 0)
    assert len(steps) == 7 and all(step[-1] == "--offline" for step in steps)


def test_checks_alone_run_no_step(shell: Path) -> None:
    assert asked(shell, 0, "--check") == [["tools/check.py"]]


def test_without_a_gpu_every_step_is_offline(shell: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    steps = asked(shell, 0, gpu=False)
    assert len(steps) == 7 and all(step[-1] == "--offline" for step in steps)


def test_counted_failures_go_on_and_others_stop(shell: Path) -> None:
    assert len(asked(shell, 0, "--offline", **{"01_curate_preferences.py": 3})) == 7
    assert len(asked(shell, 130, "--offline", **{"02_train_rm.py": 130})) == 2


def test_requirements_are_installed_when_they_change(shell: Path) -> None:
    installed = shell / "installed"
    for times in (1, 1, 2):
        if times == 2:
            (shell / "requirements-dev.txt").write_text("pytest\n")
        assert asked(shell, 0, "test", "-k", "x") == [["-m", "pytest", "-k", "x"]]
        assert installed.read_text().count("-r requirements-dev.txt") == times


def test_help_prints_the_usage(shell: Path) -> None:
    done = subprocess.run(["bash", "run.sh", "--help"], cwd=shell, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 6 and "bash run.sh test" in done.stdout


def test_the_small_run_takes_pretrained_models_and_what_it_can_reward_by(shell: Path) -> None:
    for name in ("references", "queries_heldout"):
        (shell / "data").mkdir(exist_ok=True)
        shutil.copy(ROOT / f"data/{name}.jsonl", shell / "data")
    steps = asked(shell, 0, "--small", "--policy", "weights", "--run", "x y", gpu=False)
    assert [step[0][:2] for step in steps] == ["01", "02", "03", "04", "04", "04", "05"]
    assert [step[2] for step in steps if step[0] == "04_grpo.py"] == ["none", "rm", "likelihood"]
    for step in steps:
        flags = dict(itertools.pairwise(step))
        assert (flags["--policy"], flags["--bits"], flags["--run"]) == ("weights", "16", "x y")
        assert flags["--likelihood"] == "Qwen/Qwen2.5-1.5B-Instruct" and "--offline" in step
    assert {"--labels", "likelihood"} <= set(steps[0]) and "--candidates" not in steps[0]
    for name, rows in (("references", 118), ("queries_heldout", 65)):
        assert len((shell / f"outputs/some_{name}.jsonl").read_text(encoding="utf-8").splitlines()) == rows
    # With an endpoint its agents label, references too, its judge is the reward, and nothing is offline.
    steps = asked(shell, 0, "--base-url", "http://127.0.0.1:1/v1", "--small", gpu=False)  # wherever it stands
    assert [step[2] for step in steps if step[0] == "04_grpo.py"] == ["none", "rm", "judge"]
    assert all("--offline" not in step and "Qwen/Qwen2.5-0.5B-Instruct" in step for step in steps)
    assert "--labels" not in steps[0]
    assert dict(itertools.pairwise(steps[0]))["--candidates"] == "outputs/some_references.jsonl"
