"""One asynchronous chat client for any OpenAI-compatible endpoint, and the judge that 03, 04 and 05 share.

A role is a prompt file (prompts/ROLE.md) and an answer schema. `Client.ask` renders the prompt, answers from the disk
cache where the same question was paid for before, sends it otherwise, and returns an answer that fits the schema or
raises `Unusable` with the reason. Nothing else is ever taken for an answer.
"""

import asyncio
import json
import os
import random
import re
import sqlite3
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from weakref import WeakValueDictionary

import jinja2
import jinja2.meta
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from common.records import ROOT, Messages, Record, digest, fail, file_hash, positive, read

PROMPTS = ROOT / "prompts"
MAX_WAIT = 60.0  # seconds; the longest pause between two attempts, whatever Retry-After says
MAX_TOKENS = 1024  # of one answer

A = TypeVar("A", bound=BaseModel)


class Answer(BaseModel):
    """What a model must answer with: exactly these keys, and the reason before the verdict."""

    model_config = ConfigDict(extra="forbid")
    _tokens: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> tuple[int, int]:
        """(input, output) tokens of the call that brought it, also where it now came from the cache."""
        return self._tokens


class Points(Answer):
    points: list[str]


def plain_int(value: object) -> object:
    """Refuses true and 1.0, which Python takes for 1."""
    if type(value) is not int:
        raise ValueError("not an integer")
    return value


class Verdict(Answer):
    reason: str
    verdict: Annotated[Literal[0, 1], BeforeValidator(plain_int)]


class FlawedGreeting(Answer):
    response: str = Field(min_length=1)
    flaw: str = Field(min_length=1)


class Lesson(Answer):
    lesson: str = Field(min_length=1)


class Rules(Answer):
    rules: list[str] = Field(min_length=1, max_length=10)


Grade = Annotated[Literal[1, 2, 3], BeforeValidator(plain_int)]


class Grades(Answer):
    reason: str
    language: Grade
    creativity: Grade
    emotion: Grade
    culture: Grade
    richness: Grade


class Unusable(Exception):
    """An answer that cannot be used, or none at all; str() is the reason."""


class Refused(Exception):
    """The endpoint will answer nobody: the whole run has to stop; str() says why and what to do."""


# ---- prompts --------------------------------------------------------------------------------------------------------


@lru_cache
def _templates(path: Path) -> tuple[list[jinja2.Template], set[str]]:
    """(the templates above and below the `---` of a prompt file, the names of its slots)."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # `tojson` writes < and > as \u003c and \u003e: what is judged cannot close the <data> it stands in.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    if not path.is_file():
        fail(f"{path} does not exist; restore it with: git checkout {path}")
    try:
        text = path.read_text(encoding="utf-8")
        parts = re.split(r"^---\n", text, flags=re.M)
        slots = jinja2.meta.find_undeclared_variables(environment.parse(text))
        templates = [environment.from_string(part.strip()) for part in parts]
    except jinja2.TemplateSyntaxError as e:
        fail(f"{path}:{e.lineno}: {e.message}")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8; save the file as UTF-8")
    if len(parts) > 2:
        fail(f"{path}: more than one line '---'; one parts the system message from the user's")
    return templates, slots


def render(role: str, folder: Path = PROMPTS, **slots) -> Messages:
    """The messages of a role: what stands above `---` in its file is the system message, the rest the user's."""
    path = folder / f"{role}.md"
    templates, wanted = _templates(path)
    if missing := sorted(wanted - slots.keys()):
        fail(f"{path}: no slot {', '.join(missing)} here; the slots are {', '.join(sorted(slots))}")
    try:
        texts = [template.render(**slots) for template in templates]
    except (jinja2.UndefinedError, TypeError) as e:
        fail(f"{path}: {e}; the slots are {', '.join(sorted(slots))}")
    roles = ["user"] if len(texts) == 1 else ["system", "user"]
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def prompt_hashes(roles: list[str], folder: Path = PROMPTS) -> dict[str, str]:
    return {role: file_hash(folder / f"{role}.md") for role in roles}


def read_rules(path: Path) -> list[str]:
    """The rules of a list file such as prompts/principles.md: the lines that begin with "- "."""
    if not path.is_file():
        fail(f"{path} does not exist; write one rule a line, each beginning with '- '")
    lines = path.read_text(encoding="utf-8").splitlines()
    rules = [line.strip()[2:].strip() for line in lines if line.strip().startswith("- ")]
    return rules or fail(f"{path} holds no rule; write one a line, each beginning with '- '")


class Version(Record):
    """A line of principles.jsonl, as far as the judge needs it."""

    principles: list[str] = Field(min_length=1)
    accepted: bool

    def content(self) -> tuple:
        return (self.principles, self.model_extra.get("version"))


def current_principles(path: Path) -> list[str]:
    """The principles of the last accepted version in principles.jsonl."""
    made_by = f"python 03_refine_judge.py --run {path.parent}"
    versions = [v.principles for v in read(path, Version, made_by) if v.accepted]
    return (
        versions[-1] if versions else fail(f"{path} has no accepted version; make it again: 03_refine_judge.py --redo")
    )


# ---- the client -----------------------------------------------------------------------------------------------------


def add_endpoint_flags(parser) -> None:
    """The flags of every script that talks to the agents' endpoint."""
    group = parser.add_argument_group("agents' endpoint")
    group.add_argument(
        "--base-url", default="http://127.0.0.1:8000/v1", help="OpenAI-compatible endpoint (%(default)s)"
    )
    group.add_argument("--model", default="Qwen/Qwen2.5-32B-Instruct-AWQ", help="model of the agents (%(default)s)")
    group.add_argument("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key (%(default)s)")
    group.add_argument("--concurrency", type=positive, default=64, help="requests under way at once (%(default)s)")
    group.add_argument("--timeout", type=float, default=120, help="seconds for one attempt (%(default)s)")
    group.add_argument("--attempts", type=positive, default=5, help="attempts at one question (%(default)s)")
    group.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of the prompts")


def endpoint_name(args) -> tuple[str, str]:
    """(model, endpoint): who answers; part of every cache key and of the settings of a stage."""
    if args.offline:
        from common import offline

        return offline.critic_name(), "offline"
    return args.model, args.base_url


class Store:
    """Answers and the ledger in one SQLite file: what was paid for survives a kill, and is not paid for again."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text, input_tokens, output_tokens)")
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS ledger (role, outcome, calls INT, input_tokens INT, output_tokens INT,"
            " PRIMARY KEY (role, outcome))"
        )

    def get(self, key: str) -> tuple[str, int, int] | None:
        return self.db.execute("SELECT text, input_tokens, output_tokens FROM answers WHERE key=?", (key,)).fetchone()

    def put(self, key: str, text: str, input_tokens: int, output_tokens: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?)", (key, text, input_tokens, output_tokens))

    def book(self, role: str, outcome: str, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.db.execute(
            "INSERT INTO ledger VALUES (?,?,1,?,?) ON CONFLICT DO UPDATE SET calls=calls+1,"
            " input_tokens=input_tokens+excluded.input_tokens, output_tokens=output_tokens+excluded.output_tokens",
            (role, outcome, input_tokens, output_tokens),
        )

    def ledger(self, roles: list[str], since: dict | None = None) -> dict:
        """What these roles have cost in this run folder so far, or since an earlier call of this method."""
        marks = ",".join("?" * len(roles))
        query = f"SELECT outcome, SUM(calls), SUM(input_tokens), SUM(output_tokens) FROM ledger WHERE role IN ({marks})"
        rows = self.db.execute(query + " GROUP BY outcome ORDER BY outcome", roles).fetchall()
        found = {
            "calls": sum(r[1] for r in rows),
            "retries": sum(r[1] for r in rows if r[0] != "ok"),
            "input_tokens": sum(r[2] for r in rows),
            "output_tokens": sum(r[3] for r in rows),
        }
        spent = {name: count - (since or {}).get(name, 0) for name, count in found.items()}
        return spent | {"outcomes": {r[0]: r[1] for r in rows}}  # of the whole run folder


class Client:
    """Asks roles. One a script; close it with `await client.close()` or use it as `async with`."""

    def __init__(self, args, run: Path):
        import openai

        self.prompts, self.seed, self.attempts = args.prompts, args.seed, args.attempts
        self.store = Store(run / "answers.sqlite")
        self.slots = asyncio.Semaphore(args.concurrency)
        self.asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        transport = None
        self.model, self.endpoint = endpoint_name(args)
        if args.offline:
            from common import offline

            transport = offline.transport()
        self.key = os.environ.get(args.api_key_env, "")
        self.openai = openai.AsyncOpenAI(
            base_url="http://offline.invalid/v1" if args.offline else args.base_url,
            api_key=self.key or "none",
            max_retries=0,  # retried here, where they are counted
            timeout=args.timeout,
            http_client=openai.DefaultAsyncHttpxClient(transport=transport) if transport else None,
        )

    async def __aenter__(self):
        """Ask the endpoint who it is, so that a wrong address or key shows before the work."""
        import openai

        if self.endpoint != "offline":
            try:
                await self.openai.models.list()
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                fail(f"{self.endpoint} refuses the key; set the variable that --api-key-env names")
            except openai.APIConnectionError:
                fail(f"nothing answers at {self.endpoint}; start a server, name one with --base-url, or use --offline")
            except (openai.APIError, AttributeError, TypeError, ValueError):
                pass  # not every server lists its models
        return self

    async def __aexit__(self, kind, error, traceback):
        await self.close()
        if isinstance(error, Refused):
            fail(str(error))

    async def close(self) -> None:
        await self.openai.close()

    @classmethod
    def probe(cls, args, run: Path) -> None:
        """End with one line if nobody answers at the endpoint: for a script to call before its long work."""

        async def enter_and_leave() -> None:
            async with cls(args, run):
                pass

        asyncio.run(enter_and_leave())

    async def ask(self, role: str, answer: type[A], *, temperature: float = 0.0, sample: int = 0, **slots) -> A:
        """The role's answer to a prompt with these slots; `sample` tells apart several answers to one question.

        Raises:
            Unusable: no usable answer came; str() of it is the reason.
        """
        schema = {"name": role, "schema": answer.model_json_schema(), "strict": True}
        request = {
            "model": self.model,
            "messages": render(role, self.prompts, **slots),
            "temperature": temperature,
            "max_tokens": MAX_TOKENS,
            "seed": self.seed + sample,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        key = digest(self.endpoint, request)
        async with self.asking.setdefault(
            key, asyncio.Lock()
        ):  # the same question at once: the second finds the answer
            found = self.store.get(key)
            if not found:
                async with self.slots:
                    found = await self._insist(role, request, answer)
                self.store.put(key, *found)
            return parsed(answer, *found)

    async def _insist(self, role: str, request: dict, answer: type[BaseModel]) -> tuple[str, int, int]:
        """Attempt the request until a usable answer comes, as often as --attempts allows; every attempt is booked."""
        import openai

        temperature = request["temperature"]
        for attempt in range(1, self.attempts + 1):
            wait, used = min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0), (0, 0)
            try:
                completion = await self.openai.chat.completions.create(**request)
                if usage := completion.usage:
                    used = (usage.prompt_tokens or 0, usage.completion_tokens or 0)
                text = usable_text(completion, answer)
                self.store.book(role, "ok", *used)
                return text, *used
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                self.store.book(role, "refused")
                raise Refused(f"{self.endpoint} refuses the key; set the variable that --api-key-env names") from None
            except openai.NotFoundError:
                self.store.book(role, "refused")
                raise Refused(f"{self.endpoint} has no model {self.model}; name one it serves with --model") from None
            except Unusable as e:
                reason, wait, last = str(e), 0.0, attempt >= 3 or str(e) in ("cut at the token limit", "content filter")
                # The same question would bring the same answer.
                request = request | {"seed": request["seed"] + 1_000_003, "temperature": max(0.7, temperature)}
            except (AttributeError, TypeError, ValueError):
                reason, wait, last = "not a chat completion", 0.0, attempt >= 3
            except openai.RateLimitError as e:
                reason, wait, last = "rate limit", retry_after(e.response.headers, wait), False
            except openai.APITimeoutError:
                reason, last = "timeout", False
            except openai.APIConnectionError:
                reason, last = "connection", False
            except openai.APIStatusError as e:
                reason, last = f"HTTP {e.status_code}", e.status_code < 500
            self.store.book(role, reason, *used)
            if last or attempt == self.attempts:
                raise Unusable(reason)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")


def parsed(answer: type[A], text: str, input_tokens: int, output_tokens: int) -> A:
    value = answer.model_validate_json(text)
    value._tokens = (input_tokens, output_tokens)
    return value


def retry_after(headers, otherwise: float) -> float:
    """Seconds that the server asks to wait, at most MAX_WAIT; `otherwise` where it does not say."""
    try:
        return min(MAX_WAIT, max(otherwise, float(headers["retry-after"])))
    except (KeyError, ValueError):
        return otherwise


def usable_text(completion, answer: type[BaseModel]) -> str:
    """The JSON text of a completion that fits the schema; raises Unusable with the reason otherwise."""
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message is None:
        raise Unusable("no choice")
    if choice.finish_reason == "length":
        raise Unusable("cut at the token limit")
    if choice.finish_reason == "content_filter":
        raise Unusable("content filter")
    if getattr(choice.message, "refusal", None):
        raise Unusable("refusal")
    text = (choice.message.content or "").strip()
    if not text:
        raise Unusable("empty")
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.S):
        text = fenced[1]
    try:
        return json.dumps(answer.model_validate_json(text).model_dump(), ensure_ascii=False)
    except ValidationError as e:
        raise Unusable("not the JSON asked for") from e


async def judge(client: Client, query: str, response: str, principles: list[str], sample: int = 0) -> Verdict:
    """The principle-guided judge: 1 if the response satisfies every principle, else 0, with the reason.

    Raises:
        Unusable: the endpoint gave no usable verdict. That is a failure to record, never a verdict.
    """
    return await client.ask(
        "detector", Verdict, sample=sample, temperature=0.7 if sample else 0.0,
        query=query, response=response, principles=principles,
    )  # fmt: skip
