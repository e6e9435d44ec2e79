"""What several tests need: the scripts run as a user runs them, and one small run of all five."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from process import ROOT, run_script

from common.offline.tiny_model import tiny_policy

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The first makes the run that many need, and the second does not need it.
LONG_FILES = ("pipeline", "reward_model", "processes", "hard", "faults", "policy", "judge", "evaluate")
LONG_FILES += ("with_judge", "likelihood", "check")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the tiny model before the workers ask for it, each of which would make it."""
    if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        tiny_policy()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker begins one when the others are done."""
    order = {f"test_{name}": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def small_steps(folder: Path) -> dict[str, list]:
    """The commands of the small run in `folder`/run, on the few queries of `folder`."""
    queries = ["--queries", folder / "queries.jsonl"]
    grpo = ["04_grpo.py", "--steps", 4, "--queries-per-step", 8, "--mini-batch", 4, "--micro-batch", 32, *queries]
    return {
        "01": ["01_curate_preferences.py", "--samples", 6, *queries],
        "02": ["02_train_rm.py", "--epochs", 1, "--stress-size", 20],
        "03": ["03_refine_judge.py", "--rounds", 3],
        "04_sft": ["04_grpo.py", "--reward", "none", "--sft-epochs", 1],
        "04_rm": [*grpo, "--reward", "rm"],
        "04_judge": [*grpo, "--reward", "judge"],
        "05": ["05_evaluate.py", "--search", 8, "--queries", folder / "heldout.jsonl"],
    }


def make_small_run(folder: Path) -> str:
    """Run all five steps on few queries; returns what went wrong, or ""."""
    for name, source, count in (("queries", "queries", 40), ("heldout", "queries_heldout", 24)):
        rows = (ROOT / f"data/{source}.jsonl").open("rb").readlines()
        (folder / f"{name}.jsonl").write_bytes(b"".join(rows[:count]))
    for command in small_steps(folder).values():
        done = run_script(*command, "--offline", "--run", folder / "run")
        if done.returncode:
            return f"{command}: {done.stdout}{done.stderr}"
    return ""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after all five steps: every script does its real job, only less of it.

    It is made once a session, by the worker that asks first; every worker gets a copy of its own.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    original, outcome = session / "small_run", session / "small_run.txt"
    with open(session / "small_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            original.mkdir()
            outcome.write_text(make_small_run(original), encoding="utf-8")
    assert not outcome.read_text(encoding="utf-8"), outcome.read_text(encoding="utf-8")
    copy = tmp_path_factory.mktemp("copy") / "small"
    shutil.copytree(original, copy)
    return copy / "run"
