"""What several tests need: the scripts run as a user runs them, and one small run of all five."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.offline.tiny_model import tiny_policy

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the tiny model before the workers ask for it, each of which would make it."""

    if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        tiny_policy()


def run_script(script: str, *flags: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a numbered script from the repository root and return what it printed and its exit code."""
    return subprocess.run(
        [sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=550,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder after all five steps, on few queries: every script does its real job, only less of it."""
    folder = tmp_path_factory.mktemp("small") / "run"
    for name, source, count in (("queries", "queries", 40), ("heldout", "queries_heldout", 24)):
        rows = (ROOT / f"data/{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder.parent / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    queries, heldout = folder.parent / "queries.jsonl", folder.parent / "heldout.jsonl"
    steps: list[tuple] = [
        ("01_curate_preferences.py", "--queries", queries, "--samples", 6),
        ("02_train_rm.py", "--epochs", 1, "--stress-size", 20),
        ("03_refine_judge.py", "--rounds", 3),
        ("04_grpo.py", "--reward", "none", "--sft-epochs", 1),
        ("04_grpo.py", "--reward", "rm", "--steps", 4, "--queries", queries),
        ("04_grpo.py", "--reward", "judge", "--steps", 4, "--queries", queries),
        ("05_evaluate.py", "--queries", heldout),
    ]
    for script, *flags in steps:
        done = run_script(script, "--offline", "--run", folder, *flags)
        assert done.returncode == 0, f"{script} {flags}: {done.stdout}{done.stderr}"
    return folder
