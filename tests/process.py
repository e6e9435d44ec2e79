"""Scripts as processes of their own that need not import the slow libraries: a server that has is forked for each.

Importing torch, transformers, peft and trl takes ten seconds of every start, several minutes of all tests.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "trl.trainer.grpo_trainer",
        "trl.trainer.reward_trainer",
        "trl.trainer.sft_trainer",
        "transformers.models.qwen2.modeling_qwen2",
        "matplotlib.figure",
        "openai.resources",
        "sklearn.linear_model",
    ]
)


def run_main(command: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """In the new process: become `python SCRIPT FLAGS` in the repository root, with its output in two files."""
    for path, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv, sys.path[0] = command, str(ROOT)
    runpy.run_path(command[0], run_name="__main__")


def start_script(script: str, *flags: object, stdout=os.devnull, stderr=os.devnull, **environment: str):
    """Start a script from the repository root, its output in these files; a multiprocessing.Process."""
    command = [script, *map(str, flags)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    process = FORKS.Process(target=run_main, args=(command, environment, stdout, stderr))
    process.start()
    return process


def run_script(script: str, *flags: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script from the repository root and return what it printed and its exit code."""
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = start_script(script, *flags, stdout=stdout.name, stderr=stderr.name, **environment)
        process.join(550)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(script, 550)
        printed, said = (Path(file.name).read_text(encoding="utf-8") for file in (stdout, stderr))
    return subprocess.CompletedProcess([script, *flags], process.exitcode, printed, said)
