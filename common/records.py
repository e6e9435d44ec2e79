"""The JSONL records that travel between the scripts, and the run folder they lie in: read, append, resume.

The file is the interface: a record is one JSON object on one line, its `id` a stable hash of its content, so that every
stage joins and resumes by id. A record is appended and flushed when it is done; a file written whole goes through a
temporary file and a rename. What a user can get wrong ends in one line on stderr and exit code 2.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import jsonlines
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm
from typing_extensions import TypedDict

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


class Record(BaseModel):
    """A line of a JSONL file. Keys that the model does not know are kept: users may carry their own."""

    model_config = ConfigDict(extra="allow", str_strip_whitespace=True)
    id: str = ""

    @model_validator(mode="after")
    def _fill_id(self):
        self.id = self.id or digest(*self.content())
        return self

    def content(self) -> tuple:
        """What the id is a hash of."""
        return (self.query, self.response) if hasattr(self, "response") else (self.query,)


class Query(Record):
    query: str = Field(min_length=1)
    occasion: str = ""
    recipient: str = ""


class Reference(Record):
    query: str = Field(min_length=1)
    response: str = Field(min_length=1)
    popularity: float | None = Field(default=None, ge=0)


class Labelled(Record):
    query: str = Field(min_length=1)
    response: str = Field(min_length=1)
    label: Literal[0, 1]
    flaw: str | None = None


class Candidate(Record):
    query: str = Field(min_length=1)
    response: str = Field(min_length=1)
    query_id: str = ""
    source: str = ""
    temperature: float | None = None

    @model_validator(mode="after")
    def _fill_query_id(self):
        self.query_id = self.query_id or digest(self.query)
        return self


class Judgement(Candidate):
    """A candidate with what the agents said of it. `label` is null where they could not be heard: see `error`."""

    examples: list[str] = []  # ids of the retrieved references
    positive: list[str] = []
    negative: list[str] = []
    judge: dict | None = None  # {reason, verdict}, of the first vote that is with the majority
    reflect: dict | None = None  # {reason, verdict}, of the same vote
    votes: list[Literal[0, 1]] = []  # the verdicts that decided the label: one, or --votes
    judge_votes: list[Literal[0, 1]] = []  # what Judge said in each of them, before Reflect
    label: Literal[0, 1] | None = None
    error: str | None = None
    model: str = ""
    prompts: dict[str, str] = {}  # role -> hash of its prompt file
    input_tokens: int = 0
    output_tokens: int = 0


class Message(TypedDict):
    role: str
    content: str


Messages = list[Message]  # TRL's conversational form


def two_sided(chosen: str, rejected: str) -> bool:
    """Whether a pair has two sides: two texts, and not the same."""
    return bool(chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip())


class Preference(Record):
    prompt: Messages = Field(min_length=1)
    chosen: Messages = Field(min_length=1)
    rejected: Messages = Field(min_length=1)
    query: str = ""
    query_id: str = ""
    chosen_id: str = ""
    rejected_id: str = ""
    why: str = ""

    @model_validator(mode="after")
    def _two_sides(self):
        chosen, rejected = (side[-1]["content"] for side in (self.chosen, self.rejected))
        if not two_sided(chosen, rejected):
            same = chosen.strip() == rejected.strip()
            what = "chosen and rejected are the same text" if same else "one side is empty"
            raise ValueError(f"{what}: delete the pair")
        return self

    def content(self) -> tuple:
        return (self.prompt, self.chosen, self.rejected)

    @property
    def texts(self) -> tuple[str, str, str]:
        """(prompt, chosen, rejected) as plain text."""
        return self.prompt[-1]["content"], self.chosen[-1]["content"], self.rejected[-1]["content"]


class Demonstration(Record):
    """A row of sft.jsonl."""

    prompt: Messages = Field(min_length=1)
    completion: Messages = Field(min_length=1)
    query: str = ""
    query_id: str = ""
    candidate_id: str = ""

    def content(self) -> tuple:
        return (self.prompt, self.completion)


R = TypeVar("R", bound=Record)


def read(path: Path | str, kind: type[R], made_by: str = "", unique: bool = True) -> list[R]:
    """All records of a JSONL file, ids filled in; exit code 2 with file, line and remedy if one cannot be used.

    `made_by` is the command that makes the file; it is named where the file is missing or empty. `unique` refuses two
    records with one id.
    """
    return list(stream(path, kind, made_by, unique))


def stream(path: Path | str, kind: type[R], made_by: str = "", unique: bool = True) -> Iterator[R]:
    """What `read` returns, one record after the other: for files larger than memory should hold."""
    path = Path(path)
    remedy = f"; make it with: {made_by}" if made_by else ""
    if not path.is_file():
        fail(f"{path} does not exist{remedy}")
    first_line: dict[str, int] = {}
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = kind.model_validate(json.loads(line))
            except UnicodeDecodeError:
                fail(f"{path}:{number}: not UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as e:
                fail(f"{path}:{number}: not JSON ({e.msg} at column {e.colno}); mend or delete that line")
            except ValidationError as e:
                first = e.errors(include_url=False, include_input=False)[0]
                field = ".".join(map(str, first["loc"])) or "record"
                wanted = ", ".join(name for name, f in kind.model_fields.items() if f.is_required())
                message = first["msg"].removeprefix("Value error, ")
                fail(f"{path}:{number}: {field}: {message}; a {kind.__name__.lower()} needs {wanted}")
            if unique and record.id in first_line:
                fail(f"{path}:{number}: same id as line {first_line[record.id]} ({record.id}); delete one of the two")
            if unique:
                first_line[record.id] = number
            empty = False
            yield record
    if empty:
        fail(f"{path} is empty{remedy}")


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file that a step of ours, or a trainer, wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


class Appender:
    """Appends records to a JSONL file, one flushed line each. Opening mends a torn last line by dropping it.

    `done` holds the ids that are in the file, so that a killed run goes on where it was.
    """

    def __init__(self, path: Path):
        self.done: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115 - lives as long as the appender
        self.file.seek(0)
        good = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(self.file, 1):
            try:
                self.done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                if self.file.peek(1):
                    fail(f"{path}:{number}: not a record; the file was changed by hand: mend or delete that line")
                break
            good += len(line)
            if not line.endswith(b"\n"):  # whole but for its end
                self.file.write(b"\n")
                good += 1
        self.file.truncate(good)

    def __call__(self, record: Record) -> None:
        self.file.write(record.model_dump_json().encode() + b"\n")
        self.file.flush()
        self.done.add(record.id)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; of several processes only the first."""
    if not main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write(path: Path, records: Iterable[Record | dict]) -> None:
    """Write a JSONL file whole or not at all; of several processes only the first."""
    if not main_process():
        return
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with jsonlines.open(temporary, "w", dumps=lambda o: json.dumps(o, ensure_ascii=False)) as out:
        out.write_all(r.model_dump(exclude_none=True) if isinstance(r, Record) else r for r in records)
    os.replace(temporary, path)


# ---- the run folder -------------------------------------------------------------------------------------------------


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


def rate(right: float, n: int) -> dict:
    """A share with its 95% Wilson score interval: {"value", "lo", "hi", "n"}; value is None where n is 0."""
    if n == 0:
        return {"value": None, "lo": 0.0, "hi": 1.0, "n": 0}
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    lo, hi = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return {"value": round(p, 4), "lo": round(max(0.0, lo), 4), "hi": round(min(1.0, hi), 4), "n": n}


PARTS = {"reflect": 0.4, "validation": 0.3, "test": 0.3}  # shares of the labelled queries


def split_labelled(rows: list[Labelled], seed: int) -> dict[str, list[Labelled]]:
    """The three fixed parts; a query, and so a contrast pair, is in one part only."""
    parts: dict[str, list[Labelled]] = {name: [] for name in PARTS}
    for row in rows:
        place, edge = int(digest(seed, row.query), 16) / 16**16, 0.0
        for name, share in PARTS.items():
            edge += share
            if place < edge or name == "test":
                parts[name].append(row)
                break
    for name, part in parts.items():
        if len({row.label for row in part}) < 2 or len(part) < 30:
            fail(f"the {name} part has {len(part)} labelled rows; at least 30, of both labels, are needed: add rows")
    return parts


def agreement(labels: list[int], verdicts: list[int | None]) -> dict:
    """How well verdicts agree with labels; rows without a verdict are counted as failed and left out.

    kappa is Cohen's, with its large-sample 95% interval (Cohen 1960, doi:10.1177/001316446002000104); 0 for a judge
    that always says the same. f1, precision and recall are of label 1.
    """
    heard = [(label, verdict) for label, verdict in zip(labels, verdicts, strict=True) if verdict is not None]
    n = len(heard)
    hits, said, true = (
        (sum(pick) for pick in zip(*((v == y == 1, v, y) for y, v in heard), strict=True)) if n else (0, 0, 0)
    )
    right = sum(label == verdict for label, verdict in heard)
    chance = (said * true + (n - said) * (n - true)) / n**2 if n else 1.0
    observed = right / n if n else 0.0
    kappa = (observed - chance) / (1 - chance) if chance < 1 else 0.0
    spread = 1.96 * (observed * (1 - observed) / n) ** 0.5 / (1 - chance) if chance < 1 else 0.0
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    return {
        "kappa": round(kappa, 4),
        "kappa_lo": round(kappa - spread, 4),
        "kappa_hi": round(kappa + spread, 4),
        "f1": round(2 * precision * recall / (precision + recall), 4) if precision + recall else 0.0,
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "accuracy": rate(right, n),
        "says_good": rate(said, n),
        "n": n,
        "failed": len(labels) - n,
    }


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
