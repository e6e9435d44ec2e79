"""The run folder: flags, lock, stages that resume or refuse, summaries, one-line errors."""

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit code 2: for errors that the user can mend."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
    raise SystemExit(2)


def main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that `accelerate launch` has started."""
    return os.environ.get("RANK", "0") == "0"


def digest(*parts: object) -> str:
    """16 hex digits that depend on every part and on where one part ends and the next begins."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


class Refused(Exception):
    """The endpoint will answer nobody: the whole run has to stop; str() says why and what to do."""


def add_run_flags(parser) -> None:
    """The flags that every script has."""
    group = parser.add_argument_group("run")
    group.add_argument("--run", type=Path, default=Path("outputs/run"), help="folder of this run (%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    group.add_argument(
        "--offline", action="store_true", help="no GPU, no network, no key: tiny model, rule-based critic"
    )
    group.add_argument(
        "--redo", action="store_true", help="replace what was made with other settings, prompts or inputs"
    )


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def parse(parser, offline: dict):
    """Parse the command line; with --offline the defaults in `offline` stand in for the paper's settings."""
    parser.error = lambda message: fail(f"{message}; see --help")
    if parser.parse_known_args()[0].offline:
        parser.set_defaults(**offline)
    return parser.parse_args()


def launch(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit code of a script: `main`, with one line instead of a traceback for a full disk and for Ctrl-C."""
    if not main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process says it all
    try:
        return main(args)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{e.strerror}; make room and run again: what was written before is kept")
    except sqlite3.OperationalError as e:
        fail(f"answers.sqlite: {e}; make room and run again: what was answered before is kept")
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130


def open_run(run: Path) -> Path:
    """Make the run folder and hold it until this process ends; another is refused, but for ranks of one training."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot make the folder {run}: {e.strerror}; choose another with --run")
    if not main_process():
        return run
    lock = open(run / ".lock", "a")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"another process is writing to {run}; wait for it, or choose another folder with --run")
    open_run.held = lock
    return run


def file_hash(path: Path | str) -> str:
    """Hash of a file's content, or of every file in a folder; "" where there is none."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return ""
    return digest(*map(_sha256, files))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; of several processes only the first."""
    if not main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Stage:
    """One resumable step: some outputs in the run folder and the settings they were made with.

    The settings (seed, flags, models, hashes of prompts and inputs) are written before the work starts. A later call
    with the same settings finds the step `done`, or resumes it; with other settings it stops, unless `redo`: then the
    old outputs are moved to replaced/, never deleted.
    """

    def __init__(self, run: Path, name: str, outputs: list[str], settings: dict, redo: bool = False):
        self.path, self.started = run / "stages" / f"{name}.json", time.time()
        self.settings = json.loads(json.dumps(settings, default=str))
        old = json.loads(self.path.read_text()) if self.path.is_file() else None
        present = [o for o in outputs if (run / o).exists()]
        if not main_process():  # the first looks after the files
            self.done = bool(old and old["done"] and old["settings"] == self.settings and len(present) == len(outputs))
            return
        if old and old["settings"] != self.settings:
            keys = sorted(old["settings"].keys() | self.settings.keys())
            changed = [k for k in keys if old["settings"].get(k) != self.settings.get(k)]
            if not redo:
                before, now = (", ".join(f"{k}={s.get(k)}" for k in changed) for s in (old["settings"], self.settings))
                fail(
                    f"{run / outputs[0]} was made with {before}, this call has {now}; nothing was changed: add --redo "
                    f"to make it again (the old one moves to {run / 'replaced'}), or choose another folder with --run"
                )
            aside = run / "replaced" / f"{name}-{time.time_ns()}"
            aside.mkdir(parents=True)
            for output in present:
                (aside / output).parent.mkdir(exist_ok=True)
                shutil.move(run / output, aside / output)
            shutil.move(self.path, aside / "settings.json")
            old = None
        elif not old and present:
            fail(f"{run / present[0]} is there, but not how it was made; move it away, or choose another --run")
        self.done = bool(old and old["done"] and len(present) == len(outputs))
        if not self.done:  # also where it was done once and an output is gone
            self._save(done=False)

    def _save(self, done: bool) -> None:
        replace_file(self.path, json.dumps({"done": done, "settings": self.settings}, ensure_ascii=False, indent=1))

    def finish(self) -> None:
        self._save(done=True)


def write_summary(run: Path, name: str, started: float, settings: dict, figures: dict) -> dict:
    """Write NAME.json: the figures, how long it took, with which settings and which packages."""
    packages = {}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "vllm", "openai"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    figures = {"seconds": round(time.time() - started, 1)} | figures
    summary = figures | {"settings": settings, "packages": packages}
    text = json.dumps(summary, ensure_ascii=False, indent=1, default=str)
    replace_file(run / f"{name}.json", text + "\n")
    return summary


def read_summary(run: Path, name: str) -> dict:
    """What write_summary wrote, or {} where that script has not run."""
    path = run / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
