"""One asynchronous chat client for any OpenAI-compatible endpoint."""

import asyncio
import math
import os
import random
import re
import sys
import time
from collections.abc import Awaitable
from email.utils import parsedate_to_datetime
from pathlib import Path
from weakref import WeakValueDictionary

from tqdm import tqdm

from common.answers import (
    CUT,
    FILTERED,
    NO_LOGPROBS,
    TOP_LOGPROBS,
    A,
    Answer,
    GradedVerdict,
    Text,
    Unusable,
    Verdict,
    parsed,
    response_format,
    usable_text,
)
from common.endpoint import endpoint_name
from common.prompts import render
from common.run_folder import Refused, digest, fail, main_process
from common.server import Server
from common.store import Store
from common.throttle import Throttle

MAX_WAIT = 60.0  # seconds; the longest pause between two attempts, whatever Retry-After says
MAX_TOKENS = 1024  # of one answer


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
                from common.offline.critic import transport

                address, http = (
                    "http://offline.invalid/v1",
                    openai.DefaultAsyncHttpxClient(transport=transport()),
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
GONE, NO_SCHEMAS = "nobody answers", "takes no schema"
ANSWERED_BADLY = {"not the JSON asked for", "empty", "refusal", "no choice", "not a chat completion"}
AS_ALLOWED = math.inf  # attempts: as many as --attempts allows


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
