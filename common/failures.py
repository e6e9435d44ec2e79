"""How an attempt at a question can fail, and what the client does about it: one table for both."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

# Reasons, as they appear in the ledger, in summaries and in the `error` of a judgement. A status code is "HTTP 500".
CUT, FILTERED, NO_LOGPROBS = "cut at the token limit", "content filter", "no logprobs of the verdict"
NOT_JSON, NOT_A_COMPLETION = "not the JSON asked for", "not a chat completion"
NOBODY_ANSWERS, NO_SCHEMAS = "nobody answers", "takes no schema"

KEY_REFUSED = "refuses the key; set the variable that --api-key-env names"


class Unusable(Exception):
    """A question has no usable answer; str() is the reason. A failure to record, never a score."""


class Action(Enum):
    """What follows a failed attempt: a description, and how many attempts a question that fails this way gets."""

    RETRY = "send the same request after a pause", math.inf
    SLOW_DOWN = "the same, and until the pause is over send nothing else either", math.inf
    RESAMPLE = "ask at once with another seed: the same request would bring the same answer", 3
    ALLOW_MORE_TOKENS = "ask at once with room for twice as many", 2
    GIVE_UP = "this question has no answer", 1
    # The last three say nothing about the question, and cost it no attempt.
    DROP_SCHEMA = "send no response_format from now on; where none was sent, give up", 1
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


UNUSABLE_ANSWERS = {
    CUT: Failure(CUT, Action.ALLOW_MORE_TOKENS),
    FILTERED: Failure(FILTERED, Action.GIVE_UP),
    NO_LOGPROBS: Failure(NO_LOGPROBS, Action.GIVE_UP, "leave --graded out, or name another endpoint"),
}


def diagnose(error: Exception) -> Failure:
    """What an error of one attempt means; an error that no endpoint causes is raised again."""
    import httpx2
    import openai

    match error:
        case Unusable():
            reason = str(error)
            return UNUSABLE_ANSWERS.get(reason, Failure(reason, Action.RESAMPLE))
        case openai.RateLimitError():
            return Failure("rate limit", Action.SLOW_DOWN, retry_after=retry_after(error.response.headers))
        case openai.APIStatusError():
            return error_status(error)
        case openai.APIConnectionError() if refuses_connections(error):
            return Failure(NOBODY_ANSWERS, Action.WAIT_FOR_ENDPOINT)
        case openai.APITimeoutError() if isinstance(error.__cause__, httpx2.ConnectTimeout):
            return Failure("connection", Action.RETRY)  # aiohttp reports a server that hangs up in this way
        case openai.APITimeoutError() | TimeoutError():
            return Failure("timeout", Action.RETRY)
        case openai.APIConnectionError():
            return Failure("connection", Action.RETRY)
        case openai.APIError() | AttributeError() | KeyError() | TypeError() | ValueError():
            return Failure(NOT_A_COMPLETION, Action.RESAMPLE)
    raise error


def error_status(error) -> Failure:
    """The endpoint answered with an HTTP status of 400 or above (an openai.APIStatusError)."""
    reason, body = f"HTTP {error.status_code}", " ".join(error.message.split())
    match error.status_code:
        case 401 | 403:
            return Failure(reason, Action.STOP, KEY_REFUSED)
        case 404:
            return Failure(reason, Action.STOP, "has no model {model}; name one it serves with --model")
        case 400 | 422 if re.search("response_format|json_schema", str(error)):
            return Failure(NO_SCHEMAS, Action.DROP_SCHEMA, f"asking without one from now on ({body})")
        case 408 | 409:
            return Failure(reason, Action.RETRY, body)
    return Failure(reason, Action.RETRY if error.status_code >= 500 else Action.GIVE_UP, body)


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
