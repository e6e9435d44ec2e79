"""How an attempt at a question can fail, what the client does about it, and what it leaves out of a request then."""

import math
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

# Reasons, as they appear in the ledger, in summaries and in the `error` of a judgement. A status code is "HTTP 500".
CUT, FILTERED, NO_LOGPROBS = "cut at the token limit", "content filter", "no logprobs of the verdict"
NOT_JSON, NOT_A_COMPLETION = "not the JSON asked for", "not a chat completion"
EMPTY, BROKEN_OFF = "empty", "broken off"
NOBODY_ANSWERS, NO_NUMBER = "nobody answers", "the likelihood is no number"
LOADING = ("HTTP 502", "HTTP 503")  # what an endpoint that has answered nothing yet may say while it loads its model

# An empty account, which some report as a rate limit: no wait ends it.
NO_MONEY = (
    "insufficient.?(quota|balance|funds|credit)|(balance|funds|credits?).{0,20}(insufficient|exhausted)|arrear|overdue|"
)
NO_MONEY += "used all available credits|spending limit|exceeded_current_quota|billing_(error|hard|not)|余额不足|欠费"
# What an endpoint says of a text that it does not want to read.
UNWANTED = "content.?filter|content exists risk|data_inspection|(?<!case[ -])sensitive|敏感|ResponsibleAI"
# What an endpoint may refuse in a request, by the name that it uses.
REFUSABLE = ("response_format", "max_tokens", "temperature", "seed", "logprobs", "system")


class Unusable(Exception):
    """A question has no usable answer; str() is the reason. A failure to record, never a score."""

    def __init__(self, reason: str, detail: str = ""):
        """`detail` is what came instead, or what to do about it, to show the user."""
        super().__init__(reason)
        self.detail = "".join(letter for letter in " ".join(detail.split()) if letter.isprintable())


class Action(Enum):
    """What follows a failed attempt: a description, and how many attempts a question that fails this way gets."""

    RETRY = "send the same request after a pause", math.inf
    TAKE_FEWER = "the same, with half as many under way", math.inf
    RESAMPLE = "ask at once with another seed: the same request would bring the same answer", 3
    ALLOW_MORE_TOKENS = "ask at once with room for twice as many", 2
    GIVE_UP = "this question has no answer", 1
    # The last four say nothing about the question, and cost it no attempt.
    SLOW_DOWN = "have half as many under way, and send nothing at all until the pause is over", 1
    CHANGE_REQUEST = "leave out what is refused, or rename it; where there is nothing of that kind, give up", 1
    WAIT_FOR_ENDPOINT = "wait until somebody listens at the address again", math.inf
    STOP = "no question will be answered: stop the run", 1

    @property
    def attempts(self) -> float:
        """At most; --attempts may allow fewer."""
        return self.value[1]


@dataclass(frozen=True)
class Failure:
    """What went wrong in one attempt."""

    reason: str
    action: Action
    message: str = ""  # to show the user once; with STOP, why the run stops ({model} is filled in)
    retry_after: float = 0.0  # seconds that the endpoint asks to wait


UNUSABLE_ANSWERS = {CUT: Action.ALLOW_MORE_TOKENS, FILTERED: Action.GIVE_UP, NO_LOGPROBS: Action.GIVE_UP}


def diagnose(error: Exception) -> Failure:
    """What an error of one attempt means; an error that no endpoint causes is raised again."""
    import httpx2
    import openai

    match error:
        case Unusable():
            action = UNUSABLE_ANSWERS.get(str(error), Action.RESAMPLE)
            return Failure(str(error), action, error.detail[:80] or "nothing came")
        case openai.APIStatusError():
            return reported_error(error)
        case openai.APIConnectionError() if refuses_connections(error):
            return Failure(NOBODY_ANSWERS, Action.WAIT_FOR_ENDPOINT, "it refuses connections")
        case openai.APITimeoutError() if isinstance(error.__cause__, httpx2.ConnectTimeout):
            return Failure("connection", Action.RETRY)  # aiohttp reports a server that hangs up in this way
        case openai.APITimeoutError() | TimeoutError():
            remedy = "lower --concurrency, or raise --timeout"
            return Failure("timeout", Action.TAKE_FEWER, f"half as many at once from now on; {remedy}")
        case openai.APIConnectionError():
            return Failure("connection", Action.RETRY)
        case openai.APIError() | AttributeError() | KeyError() | TypeError() | ValueError():
            return Failure(NOT_A_COMPLETION, Action.RESAMPLE)
    raise error


def reported_error(error) -> Failure:
    """What the endpoint reports, by HTTP status or inside a reply of status 200 (an openai.APIStatusError)."""
    words, status = own_words(error.body), error.status_code
    if status < 400:  # the error's code counts; one that is no status is worth another attempt
        status = int(error.code) if re.fullmatch("[45][0-9][0-9]", error.code or "") else 500

    reason, wait = f"HTTP {status}", retry_after(error.response.headers)
    out_of_money = re.search(NO_MONEY, words, re.I)  # which in a 400 may be said of the text, but for "arrears"
    match status:
        case _ if status == 402 or (out_of_money and (status != 400 or "arrear" in words.lower())):
            return Failure(reason, Action.STOP, f"wants to be paid; what was answered is kept ({words})")
        case 401:
            return Failure(reason, Action.STOP, f"refuses the key; set the variable that --api-key-env names ({words})")
        case 404:
            no_v1 = error.request.url.path == "/chat/completions" or not re.search("model|deployment", words, re.I)
            remedy = "name one it serves with --model" + no_v1 * ", or is /v1 missing at the end of --base-url?"
            return Failure(reason, Action.STOP, f"has no model {{model}}; {remedy} ({words})")
        case 429 | 503 | 529 if status == 429 or wait:
            return Failure("rate limit", Action.SLOW_DOWN, words, wait)
        case 400 | 403 if re.search(UNWANTED, words, re.I):
            return Failure(FILTERED, Action.GIVE_UP, words)
        case 400 | 422 | 500 if status < 500 or re.search(
            "role.{0,40}(system|altern|support)|system.{0,20}role|validation error", words, re.I
        ):
            return Failure(reason, Action.CHANGE_REQUEST, words)
        case 403:  # what the question is about may be forbidden; where all are refused so, the client stops by itself
            return Failure(reason, Action.GIVE_UP, f"{words}; where all are refused so, see --api-key-env")
    again = status in (408, 409) or status >= 500
    return Failure(reason, Action.RETRY if again else Action.GIVE_UP, words)


def what_next(failures: Collection[str]) -> tuple[int, str]:
    """(a script's exit code, what to do) after failures of these reasons, each perhaps preceded by whose it was."""
    if all(reason.endswith((FILTERED, NO_LOGPROBS, NO_NUMBER, "HTTP 403")) for reason in failures):
        return 0, "another call would bring the same"
    refused = ", ".join(sorted({reason for reason in failures if re.search("HTTP (400|413|422)$", reason)}))
    if refused:
        return 3, f"run again to ask again; the endpoint refuses these as they are, in its words above: {refused}"
    return 3, "run again to ask again"


def own_words(body: object) -> str:
    """What an endpoint says of an error, in one line; without FastAPI's `input`, which repeats the request."""
    if isinstance(body, Mapping):
        body = [value for name, value in body.items() if name != "input"]
    if isinstance(body, list):
        body = " ".join(map(own_words, body))
    return " ".join(str(body or "").split())


def what_to_change(request: dict, words: str) -> str:
    """What of a request the endpoint refuses in these words: the first thing that they name, or the schema, or ""."""
    sent = [*request, request["messages"][0]["role"]]
    words = re.sub("role|developer instruction", "system", words.lower())  # where no system message is known
    named = [name for name in REFUSABLE if name in sent and name in words]
    return min(named, key=words.index) if named else "response_format" if "response_format" in sent else ""


def adapt(request: dict, refused: Collection[str]) -> dict:
    """The request without what the endpoint refuses, or with it in another form."""
    kept = {name: value for name, value in request.items() if name not in refused}
    if "max_tokens" in refused:
        kept["max_completion_tokens"] = request["max_tokens"]
    if "system" in refused:
        texts = [message["content"] for message in request["messages"]]
        kept["messages"] = [{"role": "user", "content": "\n\n".join(texts)}]
    return kept


def refuses_connections(error: BaseException | None) -> bool:
    """Whether nobody listens at the address, anywhere down the chain of an error's causes."""
    while error and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return bool(error)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the header Retry-After asks to wait, a number or a date; 0 where it cannot be read."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return 0.0 if math.isnan(seconds) else seconds
