"""One asynchronous chat client for any OpenAI-compatible endpoint, and the judge that 03, 04 and 05 share.

A role is a prompt file (prompts/ROLE.md) and an answer schema. `Client.ask` renders the prompt, answers from the disk
cache where the same question was paid for before, sends it otherwise, and returns an answer that fits the schema or
raises `Unusable` with the reason. Nothing else is ever taken for an answer.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Awaitable
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from weakref import WeakValueDictionary

import jinja2
import jinja2.meta
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from tqdm import tqdm

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


class Preferred(Answer):
    reason: str
    better: Literal["A", "B", "tie"]


class Text(Answer):
    """Free text: asked without a schema, for a policy behind an endpoint."""

    text: str


class Unusable(Exception):
    """An answer that cannot be used, or none at all; str() is the reason."""


class Refused(Exception):
    """The endpoint will answer nobody: the whole run has to stop; str() says why and what to do."""


# ---- prompts --------------------------------------------------------------------------------------------------------


@lru_cache
def _templates(path: Path) -> tuple[list[jinja2.Template | str], set[str]]:
    """(the parts above and below the `---` of a prompt file, as text where it has no slots; the names of all slots)."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # `tojson` writes < and > as \u003c and \u003e: what is judged cannot close the <data> it stands in.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    if not path.is_file():
        fail(f"{path} does not exist; restore it with: git checkout {path}")
    try:
        text = path.read_text(encoding="utf-8")
        environment.parse(text)  # so that a line it complains of is the file's
        parts = [part.strip() for part in re.split(r"^---\n", text, flags=re.M)]
        slots = [jinja2.meta.find_undeclared_variables(environment.parse(part)) for part in parts]
        templates = [environment.from_string(part) for part in parts]
    except jinja2.TemplateSyntaxError as e:
        fail(f"{path}:{e.lineno}: {e.message}")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8; save the file as UTF-8")
    if len(parts) > 2:
        fail(f"{path}: more than one line '---'; one parts the system message from the user's")
    fixed = [t if names else t.render() for t, names in zip(templates, slots, strict=True)]
    return fixed, set().union(*slots)


def render(role: str, folder: Path = PROMPTS, **slots) -> Messages:
    """The messages of a role: what stands above `---` in its file is the system message, the rest the user's."""
    path = folder / f"{role}.md"
    parts, wanted = _templates(path)
    if missing := sorted(wanted - slots.keys()):
        fail(f"{path}: no slot {', '.join(missing)} here; the slots are {', '.join(sorted(slots))}")
    try:
        texts = [part if isinstance(part, str) else part.render(slots) for part in parts]
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


def address(text: str) -> str:
    """argparse type: an endpoint's address and nothing else; a key in it would end up in files and logs."""
    from urllib.parse import urlsplit

    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError("more than an address; a key belongs in the variable that --api-key-env names")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError("no address such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def odd(text: str) -> int:
    """argparse type: an odd number, or half of the votes could stand against the other half."""
    if positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} is even; an odd number always has a majority")
    return int(text)


def add_endpoint_flags(parser) -> None:
    """The flags of every script that talks to the agents' endpoint."""
    group = parser.add_argument_group("agents' endpoint")
    group.add_argument(
        "--base-url", type=address, default="http://127.0.0.1:8000/v1", help="OpenAI-compatible endpoint (%(default)s)"
    )
    group.add_argument("--model", default="Qwen/Qwen2.5-32B-Instruct-AWQ", help="model of the agents (%(default)s)")
    group.add_argument("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key (%(default)s)")
    group.add_argument(
        "--concurrency", type=positive, default=64, help="requests under way at once, at most (%(default)s)"
    )
    group.add_argument("--timeout", type=float, default=120, help="seconds for one attempt (%(default)s)")
    group.add_argument("--attempts", type=positive, default=5, help="attempts at one question (%(default)s)")
    group.add_argument("--votes", type=odd, default=1, help="verdicts asked for each greeting; the majority counts (1)")
    group.add_argument("--price-in", type=float, default=0.0, help="money for a million prompt tokens")
    group.add_argument("--price-out", type=float, default=0.0, help="money for a million answer tokens")
    group.add_argument(
        "--budget", type=float, help="stop when this run folder has cost so much: money with --price-*, tokens without"
    )
    group.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of the prompts")


def endpoint_name(args) -> tuple[str, str]:
    """(model, endpoint): who answers; part of every cache key and of the settings of a stage."""
    if args.offline:
        from common import offline

        return offline.critic_name(), "offline"
    return args.model, args.base_url


class Store:
    """Answers and the ledger in one SQLite file: what was paid for survives a kill, and is not paid for again.

    A request is noted before it is sent and its outcome is booked, with the answer, in one transaction. After a kill
    the requests without an outcome are booked as `killed`: whether the endpoint billed those, only it knows.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.executescript(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text, input_tokens, output_tokens);"
            "CREATE TABLE IF NOT EXISTS sent (number INTEGER PRIMARY KEY, role);"
            "CREATE TABLE IF NOT EXISTS ledger (role, outcome, calls INT, input_tokens INT, output_tokens INT,"
            " PRIMARY KEY (role, outcome));"
        )
        sums = self.db.execute("SELECT SUM(input_tokens), SUM(output_tokens) FROM ledger").fetchone()
        self.tokens = [count or 0 for count in sums]  # prompt and answer tokens of the run folder so far

    def get(self, key: str) -> tuple[str, int, int] | None:
        return self.db.execute("SELECT text, input_tokens, output_tokens FROM answers WHERE key=?", (key,)).fetchone()

    def begin(self, role: str) -> int:
        """Note that a request is about to be sent."""
        return self.db.execute("INSERT INTO sent (role) VALUES (?)", (role,)).lastrowid

    def end(self, number: int, role: str, outcome: str, used: tuple[int, int], key: str = "", text: str = "") -> None:
        """Book the outcome of a request, and keep its answer if it brought one."""
        with self.db:
            self.db.execute("BEGIN")
            self.db.execute("DELETE FROM sent WHERE number=?", (number,))
            self._book(role, outcome, 1, *used)
            if key:
                self.db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?)", (key, text, *used))
        self.tokens = [have + more for have, more in zip(self.tokens, used, strict=True)]

    def _book(self, role: str, outcome: str, calls: int, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.db.execute(
            "INSERT INTO ledger VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET calls=calls+excluded.calls,"
            " input_tokens=input_tokens+excluded.input_tokens, output_tokens=output_tokens+excluded.output_tokens",
            (role, outcome, calls, input_tokens, output_tokens),
        )

    def settle(self) -> None:
        """Book what a killed process left without an outcome; for the one process that holds the run folder."""
        with self.db:
            self.db.execute("BEGIN")
            for role, calls in self.db.execute("SELECT role, COUNT(*) FROM sent GROUP BY role").fetchall():
                self._book(role, "killed", calls)
            self.db.execute("DELETE FROM sent")

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


def money(args, input_tokens: int, output_tokens: int) -> float:
    return (input_tokens * args.price_in + output_tokens * args.price_out) / 1e6


class Throttle:
    """How many requests may be under way: --concurrency at most, half as many after a rate limit, slowly more again.

    A rate limit also holds every request back until the time the endpoint named.
    """

    GROWTH = 1.05  # per second in which answers come

    def __init__(self, most: int):
        self.most, self.limit, self.under_way = most, float(most), 0
        self.not_before = self.grown = 0.0
        self.waiting: deque[asyncio.Future] = deque()

    async def __aenter__(self) -> None:
        if self.waiting or self.under_way >= int(self.limit):
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]  # whoever leaves counts the place as taken
        else:
            self.under_way += 1
        while (pause := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    async def __aexit__(self, *exc) -> None:
        self.under_way -= 1
        while self.waiting and self.under_way < int(self.limit):
            future = self.waiting.popleft()
            if not future.done():
                self.under_way += 1
                future.set_result(None)

    def answered(self) -> None:
        """Let a little more through."""
        now = time.monotonic()
        if self.limit < self.most and now > self.not_before:
            self.limit = min(self.most, self.limit * self.GROWTH ** min(1.0, now - max(self.grown, self.not_before)))
            self.grown = now

    def limited(self, sent: float, wait: float) -> None:
        """A request that left at `sent` met a rate limit: hold everything for `wait` seconds.

        Requests that left before the last pause tell nothing new: they do not halve again.
        """
        now = time.monotonic()
        if sent >= self.not_before:
            self.limit = max(1.0, self.limit / 2)
            if wait >= 1:
                tqdm.write(f"rate limit: waiting {wait:.0f} s, then {int(self.limit)} at once", file=sys.stderr)
        self.not_before = max(self.not_before, now + wait)


class Client:
    """Asks roles. One a script; close it with `await client.close()` or use it as `async with`."""

    def __init__(self, args, run: Path):
        self.args, self.prompts, self.seed = args, args.prompts, args.seed
        self.model, self.endpoint = endpoint_name(args)
        self.store = Store(run / "answers.sqlite")
        self.store.settle()
        self.throttle = Throttle(args.concurrency)
        self.asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.failed: dict[str, str] = {}  # questions that brought no usable answer in this process, and why
        self.told: set[str] = set()
        self.stop = ""  # why no further request may leave
        self.key = os.environ.get(args.api_key_env, "")
        self.openai, self.connecting = None, asyncio.Lock()  # made when the first question is not in the store

    async def connect(self) -> None:
        """Ask the endpoint who it is, so that a wrong address or key shows before the work; does nothing twice."""
        async with self.connecting:
            if self.openai:
                return
            import openai

            if self.endpoint == "offline":
                from common import offline

                address, http = (
                    "http://offline.invalid/v1",
                    openai.DefaultAsyncHttpxClient(transport=offline.transport()),
                )
            else:  # aiohttp below openai's client halves what a request costs
                address, http = self.endpoint, openai.DefaultAioHttpClient()
            # Retried here, where retries are counted.
            self.openai = openai.AsyncOpenAI(
                base_url=address, api_key=self.key or "none", max_retries=0, timeout=self.args.timeout, http_client=http
            )
            if self.endpoint == "offline":
                return
            try:
                async with asyncio.timeout(self.args.timeout):
                    await self.openai.models.list()
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                raise Refused(f"{self.endpoint} refuses the key; set the variable that --api-key-env names") from None
            except (openai.APIConnectionError, TimeoutError):
                remedy = "start a server, name one with --base-url, or use --offline"
                raise Refused(f"nothing answers at {self.endpoint}; {remedy}") from None
            except (openai.APIError, AttributeError, TypeError, ValueError):
                pass  # not every server lists its models

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, traceback):
        await self.close()
        if isinstance(error, Refused):
            fail(str(error))

    async def close(self) -> None:
        if self.openai:
            await self.openai.close()

    @classmethod
    def probe(cls, args, run: Path) -> None:
        """End with one line if nobody answers at the endpoint: for a script to call before its long work."""

        async def enter_and_leave() -> None:
            async with cls(args, run) as client:
                await client.connect()

        asyncio.run(enter_and_leave())

    async def ask(self, role: str, answer: type[A], *, temperature: float = 0.0, sample: int = 0, **slots) -> A:
        """The role's answer to a prompt with these slots; `sample` tells apart several answers to one question.

        Raises:
            Unusable: no usable answer came; str() of it is the reason.
        """
        request = {
            "model": self.model,
            "messages": render(role, self.prompts, **slots),
            "temperature": temperature,
            "max_tokens": MAX_TOKENS,
            "seed": self.seed + sample,
        }
        if answer is not Text:
            request["response_format"] = response_format(role, answer)
        key = digest(self.endpoint, self.seed, sample, request)
        if found := self.store.get(key):
            return parsed(answer, *found)
        # The same question at once: the second finds the answer of the first.
        async with self.asking.setdefault(key, asyncio.Lock()):
            found = self.store.get(key)
            if not found:
                if key in self.failed:
                    raise Unusable(self.failed[key])
                await self.connect()
                try:
                    found = await self._insist(key, role, request, answer)
                except Unusable as e:
                    self.failed[key] = str(e)
                    raise
            return parsed(answer, *found)

    async def _insist(self, key: str, role: str, request: dict, answer: type[Answer]) -> tuple[str, int, int]:
        """Attempt the request until a usable answer comes, as often as --attempts allows; every attempt is booked."""
        temperature = request["temperature"]
        for attempt in range(1, self.args.attempts + 1):
            wait = min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            async with self.throttle:
                self._check()
                sent = time.monotonic()
                try:
                    return await self._attempt(key, role, request, answer)
                except Exception as e:
                    reason, again = diagnose(e)
                    if reason == "rate limit":
                        wait = retry_after(e.response.headers, wait)
                        self.throttle.limited(sent, wait)
                    elif reason.startswith(("HTTP 401", "HTTP 403")):
                        self.stop = f"{self.endpoint} refuses the key; set the variable that --api-key-env names"
                        raise Refused(self.stop) from None
                    elif reason == "HTTP 404":
                        self.stop = f"{self.endpoint} has no model {self.model}; name one it serves with --model"
                        raise Refused(self.stop) from None
                    elif reason.startswith("HTTP") and reason not in self.told:
                        self.told.add(reason)
                        tqdm.write(f"{role}: {reason}: {self._harmless(e)}", file=sys.stderr)
            if attempt == min(again, self.args.attempts):
                raise Unusable(reason)
            if reason in ANSWERED_BADLY:  # the same question would bring the same answer
                wait = 0.0
                request = request | {"seed": request["seed"] + 1_000_003, "temperature": max(0.7, temperature)}
            if reason == CUT:
                wait, request = 0.0, request | {"max_tokens": 2 * request["max_tokens"]}
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _attempt(self, key: str, role: str, request: dict, answer: type[Answer]) -> tuple[str, int, int]:
        """One request, noted before and booked after, whatever comes of it."""
        import httpx2

        outcome, used, kept, number = "cancelled", (0, 0), {}, self.store.begin(role)
        try:
            async with asyncio.timeout(self.args.timeout):  # openai's own holds for each read: a slow drip outlasts it
                # chat.completions.create() would check the schema anew for each request: most of its time
                reply = await self.openai.post("/chat/completions", body=request, cast_to=httpx2.Response)
            completion = reply.json()
            if usage := completion.get("usage"):
                used = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
            kept = {"key": key, "text": usable_text(completion, answer)}
            outcome = "ok"
            self.throttle.answered()
            return kept["text"], *used
        except Exception as e:
            outcome = diagnose(e)[0]
            raise
        finally:
            self.store.end(number, role, outcome, used, **kept)

    def _check(self) -> None:
        """Raises Refused once the run has to stop: the key is refused, or the run folder has cost its --budget."""
        if self.args.budget is not None and not self.stop:
            priced = self.args.price_in or self.args.price_out
            spent = money(self.args, *self.store.tokens) if priced else sum(self.store.tokens)
            if spent >= self.args.budget:
                self.stop = (
                    f"the budget of {self.args.budget:g}{'' if priced else ' tokens'} is spent ({spent:g}); what was "
                    "answered is kept: run again with a higher --budget to go on"
                )
        if self.stop:
            raise Refused(self.stop)

    def _harmless(self, error: Exception) -> str:
        """The first words of an error body; an endpoint may echo the key in it."""
        text = " ".join(str(getattr(error, "message", error)).split())
        return (text.replace(self.key, "***") if self.key else text)[:200]


CUT, FILTERED = "cut at the token limit", "content filter"
ANSWERED_BADLY = {"not the JSON asked for", "empty", "refusal", "no choice", "not a chat completion"}
NEVER_MIND = 1_000_000


def diagnose(error: Exception) -> tuple[str, int]:
    """(reason, number of attempts that are worth while) for an attempt that failed; other errors are raised again."""
    import httpx2
    import openai

    match error:
        case Unusable():
            reason = str(error)
            return reason, {CUT: 2, FILTERED: 1}.get(reason, 3)
        case openai.RateLimitError():
            return "rate limit", NEVER_MIND
        case openai.APITimeoutError() if isinstance(error.__cause__, httpx2.ConnectTimeout):
            return "connection", NEVER_MIND  # what aiohttp's hung-up connection comes as
        case openai.APITimeoutError() | TimeoutError():
            return "timeout", NEVER_MIND
        case openai.APIConnectionError():
            return "connection", NEVER_MIND
        case openai.APIStatusError():
            again = error.status_code >= 500 or error.status_code in (408, 409)
            return f"HTTP {error.status_code}", NEVER_MIND if again else 1
        case openai.APIError() | AttributeError() | KeyError() | TypeError() | ValueError():
            return "not a chat completion", 3
    raise error


@lru_cache
def response_format(role: str, answer: type[Answer]) -> dict:
    return {
        "type": "json_schema",
        "json_schema": {"name": role, "schema": answer.model_json_schema(), "strict": True},
    }


def parsed(answer: type[A], text: str, input_tokens: int, output_tokens: int) -> A:
    value = answer.model_validate_json(text)
    value._tokens = (input_tokens, output_tokens)
    return value


def retry_after(headers, otherwise: float) -> float:
    """Seconds that the server asks to wait, given as seconds or as a date; at most MAX_WAIT, at least `otherwise`."""
    told = headers.get("retry-after", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return otherwise
    return min(MAX_WAIT, max(otherwise, seconds)) if seconds == seconds else otherwise


def one_of_each(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads: an object that names a key twice could be read either way, so it is not read at all."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def usable_text(completion: dict, answer: type[BaseModel]) -> str:
    """The JSON text of a completion that fits the schema; raises Unusable with the reason otherwise."""
    choice = completion["choices"][0] if completion.get("choices") else None
    if not choice or not choice.get("message"):
        raise Unusable("no choice")
    if choice.get("finish_reason") == "length":
        raise Unusable(CUT)
    if choice.get("finish_reason") == "content_filter":
        raise Unusable(FILTERED)
    if choice["message"].get("refusal"):
        raise Unusable("refusal")
    text = (choice["message"].get("content") or "").strip()
    if not text:
        raise Unusable("empty")
    if answer is Text:
        return json.dumps({"text": text}, ensure_ascii=False)
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.S):
        text = fenced[1]
    try:
        json.loads(text, object_pairs_hook=one_of_each)
        return json.dumps(answer.model_validate_json(text).model_dump(), ensure_ascii=False)
    except (ValueError, RecursionError) as e:  # pydantic's ValidationError is a ValueError
        raise Unusable("not the JSON asked for") from e


async def together(*work: Awaitable) -> list:
    """The results of all; when one fails, the others end before its error is raised.

    After `Refused` they end by themselves: no new request leaves, and what is under way is paid for and worth keeping.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException as e:
        for task in tasks:
            if not isinstance(e, Refused):
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def judge(
    client: Client, query: str, response: str, principles: list[str], sample: int = 0, temperature: float | None = None
) -> Verdict:
    """The principle-guided judge: 1 if the response satisfies every principle, else 0, with the reason.

    Asked at temperature 0. With --votes the first answer is joined by others at 0.7, and the majority counts.
    `sample` and `temperature` ask the same question anew, once.

    Raises:
        Unusable: the endpoint gave no usable verdict, or no majority. That is a failure to record, never a verdict.
    """
    asked = {"query": query, "response": response, "principles": principles}
    votes = 1 if sample else client.args.votes
    answers = await asyncio.gather(
        *(
            client.ask(
                "detector", Verdict, sample=sample + n, temperature=0.7 if n else temperature or 0.0, **asked
            )
            for n in range(votes)
        ),
        return_exceptions=True,
    )  # fmt: skip
    heard = [answer for answer in answers if isinstance(answer, Verdict)]
    for side in (0, 1):
        agreeing = [answer for answer in heard if answer.verdict == side]
        if 2 * len(agreeing) > votes:
            return agreeing[0]
    raise next(answer for answer in answers if not isinstance(answer, Verdict))
