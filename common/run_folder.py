"""The run folder: the flags and the lock of a script, stages that resume or refuse, summaries, one-line errors.

A stage knows the settings it was made with. Those are whole argparse groups (`settings`), so a flag that is added to
a script cannot be forgotten in them.
"""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jinja2
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0  # seconds


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit code 2: for errors that the user can fix."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
    raise SystemExit(2)


def main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that `accelerate launch` has started."""
    return os.environ.get("RANK", "0") == "0"


def digest(*parts: object) -> str:
    """16 hex digits that depend on every part and on where one part ends and the next begins."""
    text = from_checkout(json.dumps(parts, ensure_ascii=False, sort_keys=True))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def from_checkout(text: str) -> str:
    """JSON whose paths inside this checkout begin at its folder: what is compared or hashed outlives a move of it."""
    return text.replace(f'"{ROOT}/', '"')


def valid_unicode(text: str) -> str:
    """The text with U+FFFD for every lone half of a surrogate pair: JSON can name one, but UTF-8 cannot hold it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path: Path) -> str:
    """A text that people may edit, without the marks and carriage returns that their editors leave, as they please."""
    try:
        return path.read_bytes().decode().replace("\ufeff", "").replace("\r\n", "\n")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8; save the file as UTF-8")


class Stop(Exception):
    """The whole run has to stop, for instance because the endpoint answers nobody; str() says why and what to do."""


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script has."""
    add = parser.add_argument_group("run").add_argument
    add("--run", type=Path, default=Path("outputs/run"), help="folder of this run (%(default)s)")
    add("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    add("--offline", action="store_true", help="no GPU, no network, no key: tiny model, rule-based critic")
    add("--redo", action="store_true", help="replace what was made with other settings, prompts or inputs")


@contextmanager
def slow_bar(total: int, title: str, unit: str) -> Iterator[Callable[..., None]]:
    """Yields a function that counts what is done; once that takes over ten seconds, a progress bar shows it.

    tqdm's own `delay` ends at the first line that is written beside the bar.
    """
    started, done, bars = time.monotonic(), 0, []

    def count(more: int = 1) -> None:
        nonlocal done
        done += more
        if not bars and time.monotonic() - started > SLOW:
            bars.append(tqdm(total=total, desc=title, unit=unit, leave=False))
        for bar in bars:
            bar.update(done - bar.n)

    try:
        yield count
    finally:
        for bar in bars:
            bar.close()


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)  # argparse tells of a ValueError
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def parse(parser: argparse.ArgumentParser, offline: dict) -> argparse.Namespace:
    """Parse the command line, with other defaults if --offline; `flag_groups` has the flags of each titled group."""
    parser.error = lambda message: fail(f"{message}; see --help")
    if parser.parse_known_args()[0].offline:
        parser.set_defaults(**offline)
    args = parser.parse_args()
    args.flag_groups = {group.title: [flag.dest for flag in group._group_actions] for group in parser._action_groups}
    return args


def settings(args: argparse.Namespace, *groups: str) -> dict:
    """The seed and every flag of these argparse groups: what a stage is made with. A file counts by its content."""
    values = {"seed": args.seed}
    for group in groups:
        for name in args.flag_groups[group]:
            value = getattr(args, name)
            if isinstance(value, list):
                value = [file_hash(one) if isinstance(one, Path) else one for one in value]
            values[name] = file_hash(value) if isinstance(value, Path) else value
    return values


def launch(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit code of a script: `main`, with one line instead of a traceback for a disk, a database, Ctrl-C."""
    if not main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process says it all
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows no emoji ends no run
    try:
        return main(args)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{e.strerror}; make room and run again: what was written before is kept")
    except sqlite3.DatabaseError as e:
        remedy = "make room, make it writable, end who else uses it, or if it is damaged move it away; then run again"
        fail(f"{args.run / 'answers.sqlite'}: {e}; {remedy}")
    except jinja2.TemplateError as e:
        fail(f"a chat template fails: {e}; it may take no system message, the part of policy.md above ---")
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130


def open_run(run: Path) -> Path:
    """Make the run folder and hold it until this process ends; another is refused, but for ranks of one training."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "a")  # noqa: SIM115
    except OSError as e:
        fail(f"cannot write in the folder {run}: {e.strerror}; choose another with --run")
    if not main_process():
        return run
    _locks.append(lock)
    try:
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"another process is writing to {run}; wait for it, or choose another folder with --run")
    return run


_locks: list = []  # open until the process ends: a file that is collected would let go of its lock


def file_hash(path: Path | str) -> str:
    """Hash of a file's content, or of every file in a folder; "" where there is none."""
    hashes = []
    for file in [Path(path), *sorted(Path(path).rglob("*"))] if path else []:  # of "" Path makes the working directory
        if file.is_file():
            with open(file, "rb") as content:
                hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digest(*hashes) if hashes else ""


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; of several processes only the first."""
    if not main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    temporary.write_text(valid_unicode(text), encoding="utf-8")
    os.replace(temporary, path)


class Stage:
    """One resumable step: some outputs in the run folder and the settings they were made with.

    The settings (seed, flags, models, hashes of prompts and inputs) are written before the work starts. A later call
    with the same settings finds the step `done`, or resumes it; with other settings it stops, unless `redo`: then the
    old outputs are moved to replaced/, never deleted, and the stage has `replaced` set.
    """

    def __init__(self, run: Path, name: str, outputs: list[str], settings: dict, redo: bool = False):
        self.run, self.name, self.outputs = run, name, outputs
        self.path = run / "stages" / f"{name}.json"
        text = from_checkout(json.dumps(settings, ensure_ascii=False, default=str))
        self.settings = json.loads(text)  # as they will be read back
        old = read_summary(run / "stages", name)
        present = [output for output in outputs if (run / output).exists()]
        same = bool(old) and not self._changed(old["settings"])
        self.done = same and old["done"] and len(present) == len(outputs)
        self.replaced = bool(old) and not same
        if not main_process():  # the first process looks after the files
            return
        if not old and present:
            fail(f"{run / present[0]} is there, but not how it was made; move it away, or choose another --run")
        if old and not same:
            if present and not redo:
                self._refuse(old["settings"])
            self._move_away(present)
        if not self.done:  # also where it was done once and an output is gone
            self._save(done=False)

    def _changed(self, before: dict) -> list[str]:
        """The settings that differ. Null is as good as none, which a version without the flag wrote; and where the flag
        is gone since, so is one that was off."""
        off = {name for name in before.keys() - self.settings.keys() if not before[name]}
        both = (before.keys() | self.settings.keys()) - off
        return sorted(name for name in both if before.get(name) != self.settings.get(name))

    def _refuse(self, before: dict) -> NoReturn:
        changed = self._changed(before)
        old = ", ".join(f"{name}={before.get(name)}" for name in changed)
        new = ", ".join(f"{name}={self.settings.get(name)}" for name in changed)
        fail(
            f"{self.run / self.outputs[0]} was made with {old}, this call has {new}; nothing was changed: add --redo "
            f"to make it again (the old one moves to {self.run / 'replaced'}), or choose another folder with --run"
        )

    def _move_away(self, present: list[str]) -> None:
        aside = self.run / "replaced" / f"{self.name}-{time.time_ns()}"
        aside.mkdir(parents=True)
        for output in present:
            (aside / output).parent.mkdir(exist_ok=True)
            shutil.move(self.run / output, aside / output)
        shutil.move(self.path, aside / "settings.json")

    def _save(self, done: bool) -> None:
        replace_file(self.path, json.dumps({"done": done, "settings": self.settings}, ensure_ascii=False, indent=1))

    def finish(self) -> None:
        self._save(done=True)


def unfinished(run: Path, stage: str) -> bool:
    """Whether the run folder has begun this stage and not ended it."""
    return not read_summary(run / "stages", stage).get("done", True)


def write_summary(args: argparse.Namespace, name: str, started: float, figures: dict) -> None:
    """Write NAME.json: the figures, how long it took, with which flags and which packages."""
    packages = {}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "vllm", "openai"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = {flag: value for flag, value in vars(args).items() if flag != "flag_groups"}
    summary = {"seconds": round(time.time() - started, 1), **figures, "settings": flags, "packages": packages}
    absolute = {"default": lambda value: str(value.resolve() if isinstance(value, Path) else value)}
    text = json.dumps(summary, ensure_ascii=False, indent=1, **absolute)
    replace_file(args.run / f"{name}.json", from_checkout(text) + "\n")


def read_summary(run: Path, name: str) -> dict:
    """What write_summary wrote, or {} where that script has not run; for stages too."""
    path = run / f"{name}.json"
    try:
        return json.loads(from_checkout(read_text(path))) if path.is_file() else {}
    except ValueError:
        fail(f"{path}: half of it is missing, as after a full disk or a copy that broke off; delete it and run again")
