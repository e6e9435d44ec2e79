"""One asynchronous chat client for any OpenAI-compatible endpoint, and the judge that 03, 04 and 05 share.

A role is a prompt file (prompts/ROLE.md) and an answer schema. `Client.ask` renders the prompt, answers from the disk
cache where the same question was paid for before, sends it otherwise, and returns an answer that fits the schema or
raises `Unusable` with the reason. Nothing else is ever taken for an answer.
"""

import argparse
import asyncio
import atexit
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from weakref import WeakValueDictionary

import jinja2
import jinja2.meta
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from tqdm import tqdm

from common.records import ROOT, Messages, Record, digest, fail, file_hash, main_process, positive, read

PROMPTS = ROOT / "prompts"
MAX_WAIT = 60.0  # seconds; the longest pause between two attempts, whatever Retry-After says
MAX_TOKENS = 1024  # of one answer
PORT = 8000  # of a server on this machine

A = TypeVar("A", bound=BaseModel)


class Answer(BaseModel):
    """What a model must answer with: exactly these keys, and the reason before the verdict."""

    model_config = ConfigDict(extra="forbid")
    _calls: dict[str, tuple[int, int]] = {}

    @property
    def calls(self) -> dict[str, tuple[int, int]]:
        """(input, output) tokens of each call that it rests on, by cache key, also where it now came from the cache."""
        return self._calls

    @property
    def tokens(self) -> tuple[int, int]:
        """(input, output) tokens of these calls."""
        return tuple(sum(used[side] for used in self._calls.values()) for side in (0, 1))


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

    @property
    def reward(self) -> float:
        return float(self.verdict)


class GradedVerdict(Verdict):
    """A verdict with P(verdict = 1). The model is asked for a Verdict; the grade is read from its logprobs."""

    grade: float = Field(ge=0, le=1)

    @property
    def reward(self) -> float:
        return self.grade


class FlawedGreeting(Answer):
    response: str = Field(min_length=1)
    flaw: str = Field(min_length=1)


class Lesson(Answer):
    lesson: str = Field(min_length=1)


class Rules(Answer):
    rules: list[str] = Field(min_length=1, max_length=10)


Grade = Annotated[Literal[1, 2, 3], BeforeValidator(plain_int)]
WEIGHTS = {"language": 30, "creativity": 30, "emotion": 15, "culture": 15, "richness": 10}  # of the five dimensions


class Grades(Answer):
    reason: str
    language: Grade
    creativity: Grade
    emotion: Grade
    culture: Grade
    richness: Grade

    @property
    def quality(self) -> float:
        return weighted_mean(self.model_dump())


def weighted_mean(grades: dict[str, float]) -> float:
    """Of the five dimensions' grades, 1 to 3."""
    return sum(weight * grades[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


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
    add, where = group.add_argument, group.add_mutually_exclusive_group().add_argument
    where("--base-url", type=address, default=own_address(PORT), help="OpenAI-compatible endpoint (%(default)s)")
    where("--serve", action=ServeHere, nargs="?", const=PORT, type=positive, metavar="PORT", help="start vLLM with "
          f"--model on this machine when the first answer is needed, and stop it at the end ({PORT})")  # fmt: skip
    add("--serve-flags", default="", metavar="FLAGS", help="further flags of that server, as one quoted word")
    add("--judge-memory", type=float, default=30.0, help="GiB of the GPU for a judge on it (%(default)s)")
    add("--model", default="Qwen/Qwen2.5-32B-Instruct-AWQ", help="model of the agents (%(default)s)")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key (%(default)s)")
    add("--concurrency", type=positive, default=64, help="requests under way at once, at most (%(default)s)")
    add("--timeout", type=float, default=120, help="seconds for one attempt (%(default)s)")
    add("--attempts", type=positive, default=5, help="attempts at one question (%(default)s)")
    add("--wait", type=float, default=600, help="seconds to wait for an endpoint that went away (%(default)s)")
    add("--votes", type=odd, default=1, help="verdicts asked for each greeting; the majority counts (1)")
    add("--graded", action="store_true", help="where the endpoint returns logprobs: the judge under principles also "
        "gives P(verdict = 1), and that is the judge reward of step 4")  # fmt: skip
    add("--price-in", type=float, default=0.0, help="money for a million prompt tokens")
    add("--price-out", type=float, default=0.0, help="money for a million answer tokens")
    add("--budget", type=float, help="stop when this run folder has cost so much: money with --price-*, tokens without")
    add("--prompts", type=Path, default=PROMPTS, help="folder of the prompts")


def own_address(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


class ServeHere(argparse.Action):
    """--serve: the agents' endpoint is a server of this process."""

    def __call__(self, parser, namespace, port, option=None) -> None:
        namespace.serve, namespace.base_url = port, own_address(port)


def is_local(args) -> bool:
    """Whether the agents' endpoint is on this machine, and so perhaps on this GPU."""
    from urllib.parse import urlsplit

    return not args.offline and urlsplit(args.base_url).hostname in ("127.0.0.1", "localhost", "::1")


def endpoint_name(args) -> tuple[str, str]:
    """(model, endpoint): who answers; part of every cache key and of the settings of a stage."""
    if args.offline:
        if args.graded:
            fail("--graded needs an endpoint that returns logprobs, the rule-based critic has none: leave it out")
        from common import offline

        return offline.critic_name(), "offline"
    return args.model, args.base_url


class Store:
    """Answers and the ledger in one SQLite file: what was paid for survives a kill, and is not paid for again.

    A request is noted before it is sent and its outcome is booked, with the answer, in one transaction. After a kill
    the requests without an outcome are booked as `killed`: whether the endpoint billed those, only it knows.
    """

    def __init__(self, path: Path, prices: tuple[float, float] = (0.0, 0.0)):
        """`prices` are money for a million input and output tokens."""
        self.prices = prices
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
        spent["money"] = round(self.money(spent["input_tokens"], spent["output_tokens"]), 4)
        return spent | {"outcomes": {r[0]: r[1] for r in rows}}  # of the whole run folder

    def money(self, *tokens: int) -> float:
        """What so many input and output tokens cost."""
        return sum(count * price for count, price in zip(tokens, self.prices, strict=True)) / 1e6


def open_store(args) -> Store:
    """The answers and the ledger of --run, at the prices given."""
    return Store(args.run / "answers.sqlite", (args.price_in, args.price_out))


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


def gpu_gib() -> float | None:
    """Memory of the GPU that is used first, in GiB, as its driver tells; None where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", first, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return float(done.stdout) / 1024 if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


class Server:
    """vLLM for --serve: started when the first answer is needed, started again when it dies, gone when this process is.

    It has a process group of its own, so that a Ctrl-C ends first what asks and then what answers; it gets SIGTERM when
    this process goes without a word, and nothing of the group outlasts `stop`.
    """

    START, RESTARTS, STOP = 1800, 3, 30  # seconds to load, or download, the model; times; seconds to end by itself
    here: "Server | None" = None

    @classmethod
    def start(cls, args, log: Path) -> None:
        """Start it unless it runs, and return when it answers; other ranks of one training wait for the first's.

        Ends with one line, below the end of the log, where it cannot be started.
        """
        if not cls.here:
            cls.here = cls(args, log)

    def __init__(self, args, log: Path):
        self.port, self.log, self.child = args.serve, log, None
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if main_process():
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    fail(f"something answers on port {self.port} already: ask it with --base-url "
                         f"{own_address(self.port)} instead of --serve, or give --serve another port")  # fmt: skip
            gpu = gpu_gib()
            share = ["--gpu-memory-utilization", f"{args.judge_memory / gpu:.3f}"] if gpu else []
            # A model that may put as many blanks between JSON's tokens as it likes can do so until its answer is cut.
            schemas = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
            self.command = [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model,
                "--host", "127.0.0.1", "--port", str(self.port),
                "--max-model-len", "4096", "--structured-outputs-config", schemas,
                *(share or ["--enforce-eager", "--dtype", "bfloat16"]), *shlex.split(args.serve_flags),
            ]  # fmt: skip
            if setpriv := shutil.which("setpriv"):
                self.command = [setpriv, "--pdeathsig", "TERM", *self.command]
            ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            self.environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | {k: v for k, v in os.environ.items() if k not in ours}
            self.changing = threading.Lock()
            atexit.register(self.stop)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            tqdm.write(f"starting {args.model} on port {self.port}; its log is {log}", file=sys.stderr)
            self.begin()
        self.wait()
        if self.child:
            threading.Thread(target=self.keep_up, daemon=True).start()

    def begin(self) -> None:
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self.environment,
            )  # fmt: skip

    def healthy(self) -> bool:
        try:
            return self.opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def wait(self) -> None:
        """Return when it is healthy."""
        until = time.monotonic() + self.START
        while not self.healthy():
            ended = self.child and self.child.poll() is not None
            if ended or time.monotonic() > until:
                with suppress(OSError):
                    last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                    tqdm.write("\n".join(last), file=sys.stderr)
                why = f"ended with code {self.child.returncode}" if ended else f"is not healthy after {self.START} s"
                fail(f"the server of --serve {why}; see the end of {self.log} above: less --judge-memory, other "
                     "--serve-flags, another --model, or a server elsewhere with --base-url")  # fmt: skip
            time.sleep(0.5)

    def keep_up(self) -> None:
        """Start it again when it dies, RESTARTS times at most. The clients wait meanwhile (--wait)."""
        for _ in range(self.RESTARTS):
            died = self.child.wait()
            with self.changing:
                if not self.child:
                    return
                tqdm.write(f"the server died (code {died}) and is started again; see {self.log}", file=sys.stderr)
                self.kill()
                self.begin()

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # what serves may outlast what answers, and hears no SIGTERM then
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def stop(self) -> None:
        with self.changing:
            if not self.child:
                return
            try:
                self.child.terminate()
                self.child.wait(self.STOP)
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.kill()
                self.child = None


class Client:
    """Asks roles. One a script; close it with `await client.close()` or use it as `async with`."""

    def __init__(self, args, run: Path):
        self.args, self.run = args, run
        self.model, self.endpoint = endpoint_name(args)
        self.store = Store(run / "answers.sqlite", (args.price_in, args.price_out))
        if main_process():
            self.store.settle()
        self.throttle = Throttle(args.concurrency)
        self.asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.failed: dict[str, str] = {}  # questions that brought no usable answer in this process, and why
        self.told: set[str] = set()
        self.stop = ""  # why no further request may leave
        self.schemas = True  # whether to send response_format: until the endpoint refuses it
        self.gone = asyncio.Lock()  # held by who looks whether the endpoint is back
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
                if self.args.serve:
                    Server.start(self.args, self.run / "server.log")
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
                raise self._refused(KEY_REFUSED) from None
            except (openai.APIConnectionError, TimeoutError):
                remedy = "start a server, name one with --base-url, or use --offline"
                raise self._refused(f"does not answer; {remedy}") from None
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
            "messages": render(role, self.args.prompts, **slots),
            "temperature": temperature,
            "max_tokens": MAX_TOKENS,
            "seed": self.args.seed + sample,
        }
        if answer is not Text:
            request["response_format"] = response_format(role, Verdict if answer is GradedVerdict else answer)
        if answer is GradedVerdict:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        key = digest(self.endpoint, self.args.seed, sample, request)
        if found := self.store.get(key):
            return parsed(answer, key, *found)
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
            return parsed(answer, key, *found)

    async def _insist(self, key: str, role: str, request: dict, answer: type[Answer]) -> tuple[str, int, int]:
        """Attempt the request until a usable answer comes, as often as --attempts allows; every attempt is booked."""
        temperature = request["temperature"]
        attempt = 0
        while True:
            attempt += 1
            wait = min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            async with self.throttle:
                self._check()
                if not self.schemas:
                    request = {name: value for name, value in request.items() if name != "response_format"}
                sent = time.monotonic()
                try:
                    return await self._attempt(key, role, request, answer)
                except Exception as e:
                    reason, again = diagnose(e)
                    if reason == "rate limit":
                        wait = retry_after(e.response.headers, wait)
                        self.throttle.limited(sent, wait)
                    elif reason in ("HTTP 401", "HTTP 403"):
                        raise self._refused(KEY_REFUSED) from None
                    elif reason == "HTTP 404":
                        raise self._refused(f"has no model {self.model}; name one it serves with --model") from None
                    elif reason.startswith("HTTP") or reason in (NO_LOGPROBS, NO_SCHEMAS):
                        self._tell(role, reason, e)
            if reason == GONE:
                attempt -= 1
                await self._back()
                continue
            if reason == NO_SCHEMAS and "response_format" in request:
                attempt -= 1
                self.schemas = False  # each prompt names the keys of its answer too
                continue
            if attempt == min(again, self.args.attempts):
                raise Unusable(reason)
            if reason in ANSWERED_BADLY:  # the same question would bring the same answer
                wait = 0.0
                request = request | {"seed": request["seed"] + 1_000_003, "temperature": max(0.7, temperature)}
            if reason == CUT:
                wait, request = 0.0, request | {"max_tokens": 2 * request["max_tokens"]}
            await asyncio.sleep(wait)

    async def _back(self) -> None:
        """Return when an endpoint that went away answers again; raises Refused where it does not within --wait."""
        import openai

        async with self.gone:
            until = time.monotonic() + self.args.wait
            while True:
                self._check()
                try:
                    await self.openai.models.list()
                except openai.APIConnectionError:
                    pass
                except (openai.APIError, AttributeError, TypeError, ValueError):
                    return  # it answers
                else:
                    return
                if time.monotonic() > until:
                    raise self._refused(f"went away and did not come back within --wait {self.args.wait:g} s; what was "
                                        "answered is kept: start it and run again")  # fmt: skip
                self._tell("agents", GONE, f"waiting for {self.endpoint} to come back, {self.args.wait:g} s at most")
                await asyncio.sleep(1.0)

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
            priced = any(self.store.prices)
            spent = self.store.money(*self.store.tokens) if priced else sum(self.store.tokens)
            if spent >= self.args.budget:
                self.stop = (
                    f"the budget of {self.args.budget:g}{'' if priced else ' tokens'} is spent ({spent:g}); what was "
                    "answered is kept: run again with a higher --budget to go on"
                )
        if self.stop:
            raise Refused(self.stop)

    def _refused(self, why: str) -> Refused:
        """The error that the endpoint will answer nobody; no further request leaves."""
        self.stop = f"{self.endpoint} {why}"
        return Refused(self.stop)

    def _tell(self, role: str, reason: str, error: Exception | str) -> None:
        """One line on stderr for each reason: the first words of the error body, in which the key may be echoed."""
        if reason not in self.told:
            self.told.add(reason)
            text = " ".join(str(getattr(error, "message", error)).split())
            text = "leave --graded out, or name another endpoint" if reason == NO_LOGPROBS else text
            text = f"asking without one from now on ({text})" if reason == NO_SCHEMAS else text
            text = text.replace(self.key, "***") if self.key else text
            tqdm.write(f"{role}: {reason}: {text[:200]}", file=sys.stderr)


KEY_REFUSED = "refuses the key; set the variable that --api-key-env names"
CUT, FILTERED, NO_LOGPROBS = "cut at the token limit", "content filter", "no logprobs of the verdict"
GONE, NO_SCHEMAS = "nobody answers", "takes no schema"
ANSWERED_BADLY = {"not the JSON asked for", "empty", "refusal", "no choice", "not a chat completion"}
AS_ALLOWED = math.inf  # attempts: as many as --attempts allows
TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give


def diagnose(error: Exception) -> tuple[str, float]:
    """(reason, number of attempts that are worth while) for an attempt that failed; other errors are raised again."""
    import httpx2
    import openai

    match error:
        case Unusable():
            reason = str(error)
            return reason, {CUT: 2, FILTERED: 1, NO_LOGPROBS: 1}.get(reason, 3)
        case openai.RateLimitError():
            return "rate limit", AS_ALLOWED
        case openai.APIConnectionError() if refused(error):
            return GONE, AS_ALLOWED
        case openai.APITimeoutError() if isinstance(error.__cause__, httpx2.ConnectTimeout):
            return "connection", AS_ALLOWED  # what aiohttp's hung-up connection comes as
        case openai.APITimeoutError() | TimeoutError():
            return "timeout", AS_ALLOWED
        case openai.APIConnectionError():
            return "connection", AS_ALLOWED
        case openai.APIStatusError():
            if error.status_code in (400, 422) and re.search("response_format|json_schema", str(error)):
                return NO_SCHEMAS, 1
            again = error.status_code >= 500 or error.status_code in (408, 409)
            return f"HTTP {error.status_code}", AS_ALLOWED if again else 1
        case openai.APIError() | AttributeError() | KeyError() | TypeError() | ValueError():
            return "not a chat completion", 3
    raise error


def refused(error: BaseException | None) -> bool:
    """Whether nobody listens at the address, anywhere down the chain of an error's causes."""
    while error and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return bool(error)


@lru_cache
def response_format(role: str, answer: type[Answer]) -> dict:
    return {
        "type": "json_schema",
        "json_schema": {"name": role, "schema": answer.model_json_schema(), "strict": True},
    }


def parsed(answer: type[A], key: str, text: str, input_tokens: int, output_tokens: int) -> A:
    value = answer.model_validate_json(text)
    value._calls = {key: (input_tokens, output_tokens)}
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
    fenced = re.findall(r"^```(?:json)?\s*(.*?)\s*```$", text, flags=re.S | re.M)
    text = fenced[0] if len(fenced) == 1 else text  # also with prose around it, where the schema was not obeyed
    try:
        json.loads(text, object_pairs_hook=one_of_each)
        kept = (Verdict if answer is GradedVerdict else answer).model_validate_json(text).model_dump()
    except (ValueError, RecursionError) as e:  # pydantic's ValidationError is a ValueError
        raise Unusable("not the JSON asked for") from e
    if answer is GradedVerdict:
        kept["grade"] = probability_of_one(choice, kept["verdict"])
    return json.dumps(kept, ensure_ascii=False)


def probability_of_one(choice: dict, verdict: int) -> float:
    """P(verdict = 1) from the logprobs of the token that holds the digit; raises Unusable where they are not there.

    Tokens are joined as bytes, since one may hold part of a character; every listed token that goes on with a digit, as
    " 1" or "1}", counts for it. Where the other digit is not among those listed, it gets what all of them leave over.
    """
    try:
        tokens = choice["logprobs"]["content"]
        pieces = [bytes(t["bytes"]) if t.get("bytes") is not None else t["token"].encode() for t in tokens]
        *_, found = re.finditer(rb'"verdict"\s*:\s*([01])', b"".join(pieces))
        start, number = 0, 0
        while start + len(pieces[number]) <= found.start(1):
            start, number = start + len(pieces[number]), number + 1
        before = pieces[number][: found.start(1) - start].decode()
        listed = {t["token"]: t["logprob"] for t in [*(tokens[number].get("top_logprobs") or []), tokens[number]]}
        mass = {0: 0.0, 1: 0.0}
        for token, logprob in listed.items():
            digit = token.removeprefix(before).lstrip()[:1]
            if digit in ("0", "1"):
                mass[int(digit)] += math.exp(logprob)
        other, rest = 1 - verdict, max(0.0, 1.0 - sum(map(math.exp, listed.values())))
        mass[other] = mass[other] or rest
        if int(found[1]) != verdict or not all(math.isfinite(m) for m in mass.values()):
            raise ValueError
        return mass[1] / (mass[0] + mass[1])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
        raise Unusable(NO_LOGPROBS) from e


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


async def settled(*work: Awaitable[A]) -> list[A | Unusable]:
    """The results of all, with the `Unusable` of one that failed in its place; other errors are raised at the end."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Unusable):
            raise one
    return found


async def judge(client: Client, query: str, response: str, principles: list[str], again: int = 0) -> Verdict:
    """The principle-guided judge: 1 if the response satisfies every principle, else 0, with the reason.

    Asked at temperature 0. With --votes the first answer is joined by others at 0.7, and the majority counts. With
    --graded the verdict is a GradedVerdict, its grade the mean of the votes'. Another `again` asks everything anew.

    Raises:
        Unusable: the endpoint gave no usable verdict, or no majority. That is a failure to record, never a verdict.
    """
    seen = {"query": query, "response": response, "principles": principles}
    votes, answer = client.args.votes, GradedVerdict if client.args.graded else Verdict
    answers = await settled(*(
        client.ask("detector", answer, sample=again * votes + n, temperature=0.7 if n else 0.0, **seen)
        for n in range(votes)
    ))  # fmt: skip
    heard = [answer for answer in answers if isinstance(answer, Verdict)]
    for side in (0, 1):
        agreeing = [answer for answer in heard if answer.verdict == side]
        if 2 * len(agreeing) > votes:
            found = agreeing[0].model_copy()
            found._calls = {key: used for answer in heard for key, used in answer.calls.items()}
            if isinstance(found, GradedVerdict):
                found.grade = sum(answer.grade for answer in heard) / len(heard)
            return found
    raise next(answer for answer in answers if isinstance(answer, Unusable))
