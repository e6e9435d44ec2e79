"""One asynchronous chat client for any OpenAI-compatible endpoint.

`Client.ask` renders the prompt of a role, answers from the store where the same question was paid for before, and
sends it otherwise. It returns an answer that fits the role's schema or raises `Unusable` with the reason; nothing else
is ever taken for an answer. What a failed attempt leads to is decided in failures.py.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable
from weakref import WeakValueDictionary

from tqdm import tqdm

from common.answers import TOP_LOGPROBS, A, Answer, GradedVerdict, Text, response_format, usable_text
from common.endpoint import endpoint_name
from common.failures import KEY_REFUSED, NOBODY_ANSWERS, Action, Failure, Unusable, diagnose
from common.prompts import render
from common.run_folder import Stop, digest, fail, main_process
from common.store import StoredAnswer, open_store
from common.throttle import Throttle

MAX_WAIT = 60.0  # seconds; the longest pause between two attempts, whatever Retry-After says
MAX_TOKENS = 1024  # of one answer
OTHER_SEED = 1_000_003  # added to the seed of a question that is asked again


class Client:
    """Asks roles, for one step of one run folder. Use it as `async with Client(args, "03") as client`."""

    def __init__(self, args: argparse.Namespace, step: str):
        """`step` is who pays: what is asked is booked in the ledger under it."""
        self.args = args
        self.model, self.endpoint = endpoint_name(args)
        self.key = os.environ.get(args.api_key_env, "")
        self.store = open_store(args, step)
        if main_process():
            self.store.settle()
        self.throttle = Throttle(args.concurrency)
        self.openai = None  # made when the first question is not in the store
        self.connecting = asyncio.Lock()
        self.waiting = asyncio.Lock()  # held by whoever checks whether the endpoint is back

        # By the question's key. A lock goes when nobody asks that question any more.
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.failed: dict[str, str] = {}  # why a question brought no usable answer in this process
        self.answered: dict[str, tuple[int, int]] = {}  # (input, output) tokens of an answer, also of one in the store

        self.reasons_told: set[str] = set()
        self.stop = ""  # why no further request may be sent
        self.send_schemas = True  # until the endpoint refuses response_format

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, traceback):
        if self.openai:
            await self.openai.close()
        if isinstance(error, Stop):
            fail(str(error))

    @classmethod
    def probe(cls, args: argparse.Namespace, step: str) -> None:
        """End with one line if nobody answers at the endpoint: for a script to call before its long work."""

        async def enter_and_leave() -> None:
            async with cls(args, step) as client:
                await client.connect()

        asyncio.run(enter_and_leave())

    async def connect(self) -> None:
        """Make the connection, and ask for the list of models: a wrong address or key must show before the work."""
        async with self.connecting:
            if self.openai:
                return
            import openai

            if self.endpoint == "offline":
                from common.offline.critic import transport

                address = "http://offline.invalid/v1"
                http = openai.DefaultAsyncHttpxClient(transport=transport())
            else:
                address = self.endpoint
                http = openai.DefaultAioHttpClient()  # aiohttp below openai's client halves what a request costs
            # Without retries: they are made here, where every attempt is booked.
            self.openai = openai.AsyncOpenAI(
                base_url=address, api_key=self.key or "none", timeout=self.args.timeout, max_retries=0, http_client=http
            )
            if self.endpoint != "offline" and not await self._answers():
                raise self._stop_run("does not answer; start a server, name one with --base-url, or use --offline")

    async def _answers(self) -> bool:
        """Whether anybody answers at the endpoint; raises Stop if the key is refused."""
        import openai

        try:
            async with asyncio.timeout(self.args.timeout):
                await self.openai.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise self._stop_run(KEY_REFUSED) from None
        except (openai.APIConnectionError, TimeoutError):
            return False
        except (openai.APIError, AttributeError, TypeError, ValueError):
            pass  # an answer: not every server lists its models
        return True

    async def _wait_for_endpoint(self) -> None:
        """Return when an endpoint that went away answers again; raises Stop if it does not within --wait."""
        async with self.waiting:
            self._check_stop()  # whoever waited before may have given up
            deadline, limit = time.monotonic() + self.args.wait, f"{self.args.wait:g} s"
            while not await self._answers():
                if time.monotonic() > deadline:
                    remedy = "what was answered is kept: start it and run again"
                    raise self._stop_run(f"went away and did not come back within --wait {limit}; {remedy}")
                self._tell_once("agents", NOBODY_ANSWERS, f"waiting {limit} for {self.endpoint} to come back")
                await asyncio.sleep(1.0)

    async def ask(self, role: str, answer: type[A], *, temperature: float = 0.0, sample: int = 0, **slots) -> A:
        """The role's answer to its prompt with these slots filled in; another `sample` asks for another answer.

        Raises:
            Unusable: no usable answer came; str() of it is the reason.
            Stop: no question will be answered any more.
        """
        request = {
            "model": self.model,
            "messages": render(role, self.args.prompts, **slots),
            "temperature": temperature,
            "max_tokens": MAX_TOKENS,
            "seed": self.args.seed + sample,
        }
        if answer is not Text:
            request["response_format"] = response_format(role, answer)
        if answer is GradedVerdict:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        key = digest(self.endpoint, self.args.seed, sample, request)

        # If a question is asked twice at once, the second call waits and gets the first one's answer, or its failure.
        async with self.locks.setdefault(key, asyncio.Lock()):
            stored = self.store.get(key)
            if not stored:
                if key in self.failed:
                    raise Unusable(self.failed[key])
                await self.connect()
                try:
                    stored = await self._insist(key, role, request, answer)
                except Unusable as e:
                    self.failed[key] = str(e)
                    raise
        text, *tokens = stored
        self.answered[key] = tuple(tokens)
        return answer.from_store(text, self.answered[key])

    async def _insist(self, key: str, role: str, request: dict, answer: type[Answer]) -> StoredAnswer:
        """Send the request until a usable answer comes, as often as its failures and --attempts allow."""
        attempt = 1
        while True:
            async with self.throttle:
                # Checked here because much can happen while a request waits for its turn.
                self._check_stop()
                if not self.send_schemas:
                    request.pop("response_format", None)  # each prompt names the keys of its answer too
                sent = time.monotonic()
                outcome = await self._attempt(key, role, request, answer)
                if not isinstance(outcome, Failure):
                    return outcome

                failure, backoff = outcome, min(MAX_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                pause = min(MAX_WAIT, max(backoff, failure.retry_after))
                if failure.action is Action.SLOW_DOWN:
                    self.throttle.limited(sent, pause)  # before this place is free, or another request slips through

            # Failures that are not the question's fault cost it no attempt.
            if failure.action is Action.STOP:
                raise self._stop_run(failure.message.replace("{model}", self.model))
            if failure.message:
                self._tell_once(role, failure.reason, failure.message)
            if failure.action is Action.WAIT_FOR_ENDPOINT:
                await self._wait_for_endpoint()
                continue
            if failure.action is Action.DROP_SCHEMA and "response_format" in request:
                self.send_schemas = False
                continue

            if attempt >= min(failure.action.attempts, self.args.attempts):
                raise Unusable(failure.reason)
            attempt += 1
            if failure.action is Action.RESAMPLE:
                request["seed"] += OTHER_SEED
                request["temperature"] = max(0.7, request["temperature"])
            elif failure.action is Action.ALLOW_MORE_TOKENS:
                request["max_tokens"] *= 2
            else:
                await asyncio.sleep(pause)

    async def _attempt(self, key: str, role: str, request: dict, answer: type[Answer]) -> StoredAnswer | Failure:
        """One request, noted before it is sent and booked after, whatever comes of it."""
        import httpx2

        booked_as, tokens, to_keep = "cancelled", (0, 0), {}
        number = self.store.begin(role)
        try:
            # openai's own timeout starts again with each read: an answer that drips slowly would outlast it.
            async with asyncio.timeout(self.args.timeout):
                # chat.completions.create() checks the schema of every request again, which takes most of its time.
                reply = await self.openai.post("/chat/completions", body=request, cast_to=httpx2.Response)
            completion = reply.json()
            usage = completion.get("usage") or {}
            tokens = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
            text = usable_text(completion, answer)
            booked_as, to_keep = "ok", {"key": key, "text": text}
            self.throttle.answered()
            return text, *tokens
        except Exception as e:
            failure = diagnose(e)
            booked_as = failure.reason
            return failure
        finally:
            self.store.end(number, role, booked_as, tokens, **to_keep)

    def _check_stop(self) -> None:
        """Raises Stop once the run has to stop: the endpoint refuses everybody, or the --budget is spent."""
        if self.args.budget is not None and not self.stop:
            priced = any(self.store.prices)
            spent = self.store.money(*self.store.tokens) if priced else sum(self.store.tokens)
            if spent >= self.args.budget:
                budget = f"the budget of {self.args.budget:g}{'' if priced else ' tokens'} is spent ({spent:g})"
                self.stop = f"{budget}; what was answered is kept: run again with a higher --budget to go on"
        if self.stop:
            raise Stop(self.stop)

    def _stop_run(self, why: str) -> Stop:
        """The error to raise where the endpoint will answer nobody; no further request is sent."""
        self.stop = f"{self.endpoint} {why}"
        return Stop(self.stop)

    def _tell_once(self, role: str, reason: str, message: str) -> None:
        """One line on stderr for each reason, without the key, which an endpoint may repeat in its error."""
        if reason not in self.reasons_told:
            self.reasons_told.add(reason)
            text = message.replace(self.key, "***") if self.key else message
            tqdm.write(f"{role}: {reason}: {text[:200]}", file=sys.stderr)


async def gather_all(*work: Awaitable) -> list:
    """The results of all; when one fails, the others end before its error is raised.

    After `Stop` they end by themselves: no new request is sent, and what is under way is paid for and worth keeping.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException as e:
        if not isinstance(e, Stop):
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def gather_or_unusable(*work: Awaitable[A]) -> list[A | Unusable]:
    """The results of all, with the `Unusable` of one that failed in its place; other errors are raised at the end."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Unusable):
            raise result
    return results
