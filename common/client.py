"""One asynchronous chat client for any OpenAI-compatible endpoint.

`Client.ask` renders the prompt of a role, answers from the store where the same question was paid for before, and
sends it otherwise. It returns an answer that fits the role's schema or raises `Unusable` with the reason; nothing else
is ever taken for an answer. What a failed attempt leads to is decided in failures.py.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Awaitable
from weakref import WeakValueDictionary

from tqdm import tqdm

from common.answers import TOP_LOGPROBS, A, Answer, GradedVerdict, Text, response_format, tokens_of, usable_text
from common.endpoint import endpoint_name, proxies_to
from common.failures import LOADING, Action, Failure, Unusable, adapt, diagnose, what_to_change
from common.prompts import render
from common.run_folder import Stop, digest, fail, main_process, slow_bar
from common.store import StoredAnswer, open_store
from common.throttle import Throttle

MAX_WAIT = 60.0  # seconds; the longest pause between two attempts, whatever Retry-After says
MAX_TOKENS = 1024  # of one answer
OTHER_SEED = 1_000_003  # added to the seed of a question that is asked again
MOST_WAITS = 30  # of one question for rate limits; more, and it is the question that is too large for them
ALIKE = 8  # questions; if as many fail alike and none was ever answered, the next thousand would fail too


class Client:
    """Asks roles, for one step of one run folder. Use it as `async with Client(args, "03") as client`."""

    def __init__(self, args: argparse.Namespace, step: str, flags: str = r"\g<0>"):
        """`step` is who pays: what is asked is booked under it. `flags` replaces the agents' flags in error lines."""
        self.args = args
        self.model, self.endpoint = endpoint_name(args)
        self.key = "" if self.endpoint == "offline" else os.environ.get(args.api_key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            fail(f"the key in {args.api_key_env} holds characters that no key has: set it again")
        self.flags = flags
        self.store = open_store(args, step)
        if main_process():
            self.store.settle()
        self.throttle = Throttle(args.concurrency)
        self.openai = None  # made when the first question is not in the store
        self.connecting = asyncio.Lock()
        self.waiting = asyncio.Lock()  # held by whoever checks whether the endpoint is back
        self.away_since = 0.0  # by time.monotonic(): when it was found away, or loading; 0 after an answer

        # By the question's key. A lock goes when nobody asks that question any more.
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.failed: dict[str, str] = {}  # why a question brought no usable answer in this process
        self.streak: list[str] = []  # why the last questions failed, since one was answered
        self.answered: dict[str, tuple[int, int]] = {}  # (input, output) tokens of an answer, also of one in the store

        self.reasons_told: set[str] = set()
        self.stop = ""  # why no further request may be sent
        self.refused: set[str] = set()  # what is left out of every request, or renamed: see REFUSABLE
        self.taken: set[str] = set()  # roles whose requests the endpoint has answered as they are now

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
            import httpx2
            import openai

            if self.endpoint == "offline":
                from common.offline.critic import transport

                address, route = "http://offline.invalid/v1", ""
                http = openai.DefaultAsyncHttpxClient(transport=transport())
            else:
                address, route = self.endpoint, proxies_to(self.endpoint)
                try:  # aiohttp below openai's client halves what a request costs
                    certificates = httpx2.create_ssl_context()
                    http = openai.DefaultAioHttpClient(trust_env=bool(route), verify=certificates)
                except OSError as e:
                    raise self._stop_run(f"cannot be asked: see SSL_CERT_FILE and SSL_CERT_DIR ({e})") from None
                except (ValueError, httpx2.InvalidURL):
                    raise self._stop_run(f"cannot be asked{route}: name an http:// proxy there, or none") from None
            for name in ("OPENAI_CUSTOM_HEADERS", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
                os.environ.pop(name, None)  # openai's client would send them to every address that it talks to
            # Without retries: they are made here, where every attempt is booked.
            self.openai = openai.AsyncOpenAI(
                base_url=address, api_key=self.key or "none", timeout=self.args.timeout, max_retries=0, http_client=http
            )
            failure = await self._silence() if self.endpoint != "offline" else None
            if failure and failure.action is Action.WAIT_FOR_ENDPOINT and self.args.wait and not route:
                await self._wait_for_endpoint(failure)
            elif failure:
                remedy = "start it, add --wait SECONDS while it loads, name one with --base-url, or use --offline"
                raise self._stop_run(f"does not answer{route}; {remedy}")

    async def _silence(self) -> Failure | None:
        """Why nobody answers at the endpoint, None if anybody does; raises Stop if the key is refused."""
        import openai

        try:
            async with asyncio.timeout(self.args.timeout):
                await self.openai.models.list()
        except openai.AuthenticationError as e:
            raise self._stop_run(diagnose(e).message) from None
        except (openai.APIConnectionError, TimeoutError) as e:
            return diagnose(e)
        except (openai.APIError, AttributeError, TypeError, ValueError):
            return None  # an answer: not every server lists its models, or not for every key

    async def _wait_for_endpoint(self, failure: Failure) -> None:
        """Return when an endpoint that is away, or loads its model, is worth a try; raises Stop after --wait."""
        async with self.waiting:
            self._check_stop()  # whoever waited before may have given up
            wait = 600.0 if self.args.wait is None else self.args.wait
            # Its own variable: an answer that was on its way when the server died sets the client's back meanwhile.
            since = self.away_since = self.away_since or time.monotonic()
            while time.monotonic() - since < wait:
                self._tell_once("agents", failure.reason, f"waiting {wait:g} s for {self.endpoint} ({failure.message})")
                if not await self._silence():
                    return
                await asyncio.sleep(1.0)
            remedy = "what was answered is kept: start it, or name one with --base-url, and run again"
            raise self._stop_run(f"is away, did not come back within --wait {wait:g} s; {remedy} ({failure.message})")

    async def ask(self, role: str, answer: type[A], *, temperature: float = 0.0, sample: int = 0, **slots) -> A:
        """The role's answer to its prompt with these slots filled in; another `sample` asks for another answer.

        Raises:
            Unusable: no usable answer came; str() of it is the reason.
            Stop: no question will be answered any more.
        """
        request = {"model": self.model, "messages": render(role, self.args.prompts, **slots)}
        request |= {"temperature": temperature, "max_tokens": MAX_TOKENS, "seed": self.args.seed + sample}
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
                    self.streak.append(str(e))
                    self._stop_if_all_fail_alike(role, e)
                    raise
                self.streak.clear()
        text, *tokens = stored
        self.answered[key] = tuple(tokens)
        return answer.from_store(text, self.answered[key])

    async def _insist(self, key: str, role: str, request: dict, answer: type[Answer]) -> StoredAnswer:
        """Send the request until a usable answer comes, as often as its failures and --attempts allow."""
        attempt, waits = 1, 0
        while True:
            async with self.throttle.place(first=attempt > 1):
                # Checked here because much can happen while a request waits for its turn.
                self._check_stop()
                sent = time.monotonic()
                outcome = await self._send_as_taken(key, role, request, answer)
                if not isinstance(outcome, Failure):
                    return outcome

                failure = outcome
                backoff = min(MAX_WAIT, 0.5 * 2 ** min(9, attempt + waits)) * random.uniform(0.5, 1.0)
                pause = min(MAX_WAIT, max(backoff, failure.retry_after))
                if failure.action in (Action.SLOW_DOWN, Action.TAKE_FEWER):
                    # Before this place is free, or another request slips through.
                    self.throttle.limited(sent, pause if failure.action is Action.SLOW_DOWN else 0.0)

            # Failures that are not the question's fault cost it no attempt.
            if failure.action is Action.STOP:
                raise self._stop_run(failure.message.replace("{model}", self.model))
            away = failure.action is Action.WAIT_FOR_ENDPOINT or (failure.reason in LOADING and not self.taken)
            if away:
                await asyncio.sleep(pause)
                await self._wait_for_endpoint(failure)
            if away or (failure.action is Action.SLOW_DOWN and waits < MOST_WAITS):
                waits += 1
                continue

            if failure.message:
                self._tell_once(role, failure.reason, failure.message)
            if attempt >= min(failure.action.attempts, self.args.attempts):
                raise Unusable(failure.reason, failure.message)
            attempt += 1
            if failure.action is Action.RESAMPLE:
                request["seed"] += OTHER_SEED
                request["temperature"] = max(0.7, request["temperature"])
            elif failure.action is Action.ALLOW_MORE_TOKENS:
                request["max_tokens"] *= 2
            else:
                await asyncio.sleep(pause)

    async def _send_as_taken(self, key: str, role: str, request: dict, answer: type[Answer]) -> StoredAnswer | Failure:
        """An attempt without what the endpoint refuses; what is found to be refused is left out from then on."""
        tried: dict[str, str] = {}  # what this request goes without, on trial -> the words that refused it
        doubted = None  # the last request that was refused in words that name no part of it
        while True:
            as_sent = adapt(request, self.refused | tried.keys())
            outcome = await self._attempt(key, role, as_sent, answer)
            action = outcome.action if isinstance(outcome, Failure) else None
            if action in (None, Action.RESAMPLE, Action.ALLOW_MORE_TOKENS):  # it was taken, whatever came of it
                self.taken.add(role)
                self.away_since = 0.0
                self.refused |= tried.keys()
                for name, words in tried.items():
                    self._tell_once(role, f"takes no {name}", f"left out or sent in another form from now on ({words})")
            change = what_to_change(as_sent, outcome.message) if action is Action.CHANGE_REQUEST else ""
            # A role that is taken may still meet what another question has found out meanwhile.
            if not change or (role in self.taken and change not in self.refused):
                return outcome
            if as_sent != doubted and (change == "system" or change not in outcome.message.lower()):
                doubted = as_sent  # "Bad request", "System error": by chance, unless it comes again
                continue
            tried[change] = outcome.message

    async def _attempt(self, key: str, role: str, request: dict, answer: type[Answer]) -> StoredAnswer | Failure:
        """One request, noted before it is sent and booked after, whatever comes of it."""
        import httpx2
        import openai

        booked_as, tokens, to_keep = "cancelled", (0, 0), {}
        number = self.store.begin(role)
        try:
            # openai's own timeout starts again with each read: an answer that drips slowly would outlast it.
            async with asyncio.timeout(self.args.timeout):
                # chat.completions.create() checks the schema of every request again, which takes most of its time.
                reply = await self.openai.post("/chat/completions", body=request, cast_to=httpx2.Response)
            completion = json.loads(self._without_key(reply.content.decode()))
            tokens = tokens_of(completion.get("usage") or {})
            if completion.get("error"):
                raise openai.APIStatusError("", response=reply, body=completion["error"])
            if self.args.budget is not None and completion.get("choices") and not any(tokens):
                self._stop_run("reports no usage, so that no --budget can be kept: run again without one")  # not raised
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

    def _stop_if_all_fail_alike(self, role: str, error: Unusable) -> None:
        """Raises Stop where so many in a row fail for one reason, and this role was never answered before."""
        alike = len(self.streak) >= ALIKE and len(set(self.streak[-ALIKE:])) == 1 and not self.answered
        if alike and not self.store.ledger(role)["outcomes"].get("ok"):
            raise self._stop_run(f"answers none of {ALIKE} questions in a row: {error} ({error.detail})")

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
        why = re.sub("--(base-url|model|api-key-env)", self.flags, why)
        self.stop = self._without_key(f"{self.endpoint} {why}")[:400]
        return Stop(self.stop)

    def _tell_once(self, role: str, reason: str, message: str) -> None:
        """One line on stderr for each reason."""
        if reason not in self.reasons_told:
            self.reasons_told.add(reason)
            tqdm.write(f"{role}: {reason}: {self._without_key(message)[:200]}", file=sys.stderr)

    def _without_key(self, text: str) -> str:
        """An endpoint may repeat the key, in an error or in an answer."""
        return text.replace(self.key, "***") if len(self.key) >= 8 else text  # a shorter one is a placeholder


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
    tasks = [asyncio.ensure_future(one) for one in work]
    with slow_bar(len(tasks), "answers", "answer") as count:
        for task in tasks:
            task.add_done_callback(lambda _: count())
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Unusable):
            raise result
    return results
