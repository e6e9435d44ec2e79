"""The JSONL records that travel between the scripts: read, append, replace.

A record is one JSON object on one line, and its `id` is a stable hash of its content, so every stage joins and resumes
by id. A record is appended and flushed as soon as it is ready; a file written whole goes through a temporary file.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import jsonlines
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict

from common.run_folder import digest, fail, replace_file, valid_unicode


class Record(BaseModel):
    """A line of a JSONL file. Keys that the model does not know are kept: users may carry their own."""

    model_config = ConfigDict(extra="allow", str_strip_whitespace=True)
    id: str = Field(default="", coerce_numbers_to_str=True)

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
    constraints: list[str] = []  # its words that ask for something which a rule can check (constraints.py)


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
    query_id: str = Field(default="", coerce_numbers_to_str=True)
    source: str = ""
    temperature: float | None = None

    @model_validator(mode="after")
    def _fill_query_id(self):
        self.query_id = self.query_id or digest(self.query)
        return self


class Judgement(Candidate):
    """A candidate with what the agents said of it.

    `label` is null where one gave no usable answer (see `error`), and where --labels likelihood cannot tell.
    """

    examples: list[str] = []  # ids of the retrieved references
    positive: list[str] = []
    negative: list[str] = []
    judge: dict | None = None  # {reason, verdict}
    reflect: dict | None = None  # {reason, verdict}; the final verdict, where Reflect is asked
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
    """A row of preferences.jsonl. Step 1 adds the ids of query, chosen and rejected."""

    prompt: Messages = Field(min_length=1)
    chosen: Messages = Field(min_length=1)
    rejected: Messages = Field(min_length=1)
    query: str = ""  # if there is none, the prompt
    why: str = ""

    @model_validator(mode="after")
    def _two_sides(self):
        if not two_sided(*self.texts[1:]):
            raise ValueError("chosen and rejected are the same text, or one is empty: delete the pair")
        self.query = self.query or self.texts[0]
        return self

    def content(self) -> tuple:
        return (self.prompt, self.chosen, self.rejected)

    @property
    def texts(self) -> tuple[str, str, str]:
        """(prompt, chosen, rejected) as plain text."""
        return self.prompt[-1]["content"], self.chosen[-1]["content"], self.rejected[-1]["content"]


class Demonstration(Record):
    """A row of sft.jsonl. Step 1 adds its query, with its id, and the candidate's id."""

    prompt: Messages = Field(min_length=1)
    completion: Messages = Field(min_length=1)

    def content(self) -> tuple:
        return (self.prompt, self.completion)


R = TypeVar("R", bound=Record)


def read(path: Path | str, kind: type[R], made_by: str = "", unique: bool | dict = True) -> list[R]:
    """All records of a JSONL file, ids filled in; exit code 2 with file, line and remedy if one cannot be used.

    `made_by`, the command that makes the file, is named where it is missing or empty. `unique`: refuse one id twice;
    with a dict, which several files may share, only for another text.
    """
    return list(stream(path, kind, made_by, unique))


def stream(path: Path | str, kind: type[R], made_by: str = "", unique: bool | dict = True) -> Iterator[R]:
    """The same records one at a time, for files too large to hold in memory."""
    path = Path(path)
    remedy = f"; make it with: {made_by}" if made_by else ""
    if not path.is_file():
        fail(f"{path} does not exist{remedy}")
    first = unique if isinstance(unique, dict) else {}  # id -> (place, what may come again under it)
    empty = True
    for place, row in numbered_rows(path):
        try:
            record = kind.model_validate(row)
        except ValidationError as e:
            problem = e.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, problem["loc"])) or "record"
            required = [name for name, f in kind.model_fields.items() if f.is_required()]
            advice = f"a {kind.__name__.lower()} needs {', '.join(required)}"
            if problem["loc"] and problem["loc"][0] not in required:
                advice = "correct it or leave it out"
            fail(f"{place}: {field}: {problem['msg'].removeprefix('Value error, ')}; {advice}")
        if unique is not False:
            content = place if unique is True else digest(*record.content())
            first_place, first_content = first.setdefault(record.id, (place, content))
            if content != first_content:
                fail(f"{place}: same id as {first_place} ({record.id}); delete one, or give it an id of its own")
        empty = False
        yield record
    if empty:
        fail(f"{path} is empty{remedy}")


def numbered_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, row) of every line that is not blank; exit code 2 with file and line if one is not JSON.

    A line ends at "\\n" alone, unlike those of splitlines(). Joined files may have a byte order mark in any line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode().lstrip("\ufeff").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError:
                fail(f"{place}: not UTF-8; save the file as UTF-8")
            except (ValueError, RecursionError) as e:
                fail(f"{place}: not JSON ({e}); fix or delete that line")
            if "\\u" in text:  # only an escape can name half of a character
                row = json.loads(as_json(row))
            if text:
                yield place, row


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file that one of our steps, or a trainer, wrote; none where there is no file."""
    return [row for _, row in numbered_rows(path)] if path.is_file() else []


def as_json(row: dict) -> str:
    return valid_unicode(json.dumps(row, ensure_ascii=False))


class Appender:
    """Appends records to a JSONL file, one flushed line each. Opening drops a torn last line.

    `done` holds the ids that are in the file, so that a killed run resumes where it was.
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
                    fail(f"{path}:{number}: not a record; the file was changed by hand: fix or delete that line")
                break
            good += len(line)
            if not line.endswith(b"\n"):  # whole but for its end
                self.file.write(b"\n")
                good += 1
        self.file.truncate(good)

    def __call__(self, record: Record) -> None:
        self.file.write(as_json(record.model_dump()).encode() + b"\n")
        self.file.flush()
        self.done.add(record.id)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


def write(path: Path, records: Iterable[Record | dict]) -> None:
    """Write a JSONL file whole or not at all; of several processes only the first."""
    lines = io.StringIO()
    with jsonlines.Writer(lines, dumps=as_json) as writer:
        writer.write_all(r.model_dump(exclude_none=True) if isinstance(r, Record) else r for r in records)
    replace_file(path, lines.getvalue())


PARTS = {"reflect": 0.4, "validation": 0.3, "test": 0.3}  # shares of the labelled queries


def split_labelled(rows: list[Labelled], seed: int) -> dict[str, list[Labelled]]:
    """The three fixed parts, in the order of the rows; a query, and so a contrast pair, is in one part only."""
    parts: dict[str, list[Labelled]] = {name: [] for name in PARTS}
    for row in rows:
        draw = int(digest(seed, row.query), 16) / 16**16  # a query's hash is a uniform draw from [0, 1)
        if draw < PARTS["reflect"]:
            parts["reflect"].append(row)
        else:
            parts["validation" if draw < PARTS["reflect"] + PARTS["validation"] else "test"].append(row)
    for name, part in parts.items():
        if len({row.label for row in part}) < 2 or len(part) < 30:
            fail(f"the {name} part has {len(part)} labelled rows; at least 30, of both labels, are needed: add rows")
    return parts
