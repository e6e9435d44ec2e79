"""What an agent must answer with, and its strict reading: an answer that does not fit is no answer."""

import json
import math
import re
from functools import lru_cache, partial
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from common.failures import BROKEN_OFF, CUT, EMPTY, FILTERED, NO_LOGPROBS, NOT_JSON, Unusable

TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give

# What finish_reason says, in small letters alone -> why the answer is not whole, "" if it is. Servers differ;
# what is not listed (error, abort, tool_calls) is BROKEN_OFF.
ENDINGS = {
    "|stop.*|eos.*|endturn|completed?": "",
    ".*(length|max.*tokens|tokenlimit).*": CUT,
    ".*(filter|safety|sensitive|refus|blocklist|prohibited|recitation).*": FILTERED,
}
# <think>, [THINK], <|begin_of_thought|> and what closes them, alone where the prompt ends with the opening tag.
THOUGHT = r"(?:[a-z]+[:_])?(?:think|thinking|thoughts?|thought_process|reason|reasoning|reflection|analysis|scratchpad)"
THOUGHT += r"(?:[: ][^<>\]]*)?\|?[>\]▷]"
OPENING, CLOSING = (
    re.compile(rf"[<\[◁]\|?{mark}{THOUGHT}", re.I) for mark in ("(?:begin_of_|start_)?", "(?:/|end_of_|end_)")
)
FINAL = "<|channel|>final<|message|>"  # after it gpt-oss answers, if a server passes its channels on
WRAPPER = re.compile(r"<(answer|response)>(.*)</\1>", re.S)
SPECIAL = re.compile(r"<\|[\w ]+\|?>|<\w+\|>")  # a token that a server should have kept to itself

# The object that is the answer is the only one, begins a line, and only the end of its fence follows. All else may be a
# quotation: who judges a text that holds a verdict repeats it, and says before or after it what to make of it.
ALONE = re.compile(r"(?:[^{]*\n)?[ \t]*(?:`{3,}[ \t]*\w*\s*)?(\{.*\})\s*(?:`{3,})?", re.S)

# At most so many characters, where the endpoint decodes by the schema: a small judge runs on otherwise. A longer one is
# taken as it is: the length of a reason says nothing about the verdict.
Point = Annotated[str, Field(json_schema_extra={"maxLength": 120})]
Reason = Annotated[str, Field(json_schema_extra={"maxLength": 300})]


class Answer(BaseModel):
    """What a model must answer with: exactly these keys, in this order, so the reason before the verdict."""

    model_config = ConfigDict(extra="forbid")
    _tokens: tuple[int, int] = (0, 0)

    @classmethod
    def from_store(cls, text: str, tokens: tuple[int, int]) -> Self:
        """The answer whose text `usable_text` has checked before it was stored."""
        answer = cls.model_validate_json(text)
        answer._tokens = tokens
        return answer

    @property
    def tokens(self) -> tuple[int, int]:
        """(input, output) tokens that it took, also where it now comes from the store."""
        return self._tokens


A = TypeVar("A", bound=Answer)


def plain_int(value: object) -> object:
    """Refuses true and 1.0, which Python takes for 1."""
    if type(value) is not int:
        raise ValueError("not an integer")
    return value


class Points(Answer):
    points: list[Point] = Field(json_schema_extra={"maxItems": 10})


class Verdict(Answer):
    reason: Reason
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
    response: str = Field(min_length=1, json_schema_extra={"maxLength": 600})
    flaw: Point = Field(min_length=1)


class Lesson(Answer):
    lesson: Reason = Field(min_length=1)


class Rules(Answer):
    rules: list[Point] = Field(min_length=1, max_length=10)


Grade = Annotated[Literal[1, 2, 3], BeforeValidator(plain_int)]
WEIGHTS = {"language": 30, "creativity": 30, "emotion": 15, "culture": 15, "richness": 10}  # of the five dimensions


class Grades(Answer):
    reason: Reason
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
    reason: Reason
    better: Literal["A", "B", "tie"]


class Text(Answer):
    """Free text: asked without a schema, for a policy behind an endpoint."""

    text: str = Field(min_length=1)


def schema_of(answer: type[Answer]) -> type[Answer]:
    """What the model is asked for: it must not state the grade, which is read from the logprobs."""
    return Verdict if answer is GradedVerdict else answer


@lru_cache
def response_format(role: str, answer: type[Answer]) -> dict:
    """The OpenAI parameter that makes an endpoint decode nothing but this schema."""
    schema = schema_of(answer).model_json_schema()
    return {"type": "json_schema", "json_schema": {"name": role, "schema": schema, "strict": True}}


def usable_text(completion: dict, answer: type[Answer]) -> str:
    """The JSON text of a chat completion, checked against the schema; raises Unusable with the reason otherwise."""
    choice = completion["choices"][0] if completion.get("choices") else None
    if not choice:
        raise Unusable("no choice", str(completion))
    message = choice.get("message") or {}
    text, ending = text_of(message), choice.get("finish_reason") or ""
    letters = re.sub("[-_. ]", "", str(ending)).lower().removeprefix("finishreason")
    reason = next((reason for words, reason in ENDINGS.items() if re.fullmatch(words, letters)), BROKEN_OFF)
    if reason:
        raise Unusable(reason, f"{ending}: {text}")
    if message.get("refusal"):
        raise Unusable("refusal", str(message["refusal"]))
    if not text:
        raise Unusable(EMPTY, str(message.get("reasoning_content") or message.get("reasoning") or ""))
    try:
        found = {"text": outside_thoughts(text)} if answer is Text else read_object(text)
        # As JSON, of which pydantic refuses half a surrogate pair: no file could take it.
        fields = schema_of(answer).model_validate_json(json.dumps(found)).model_dump()
    except (ValueError, RecursionError) as e:  # pydantic's ValidationError is a ValueError
        raise Unusable(EMPTY if answer is Text else NOT_JSON, text) from e
    if answer is Text and SPECIAL.search(fields["text"]):
        raise Unusable("special tokens in the text", fields["text"])
    if answer is GradedVerdict:
        fields["grade"] = probability_of_one(choice, fields["verdict"])
    return json.dumps(fields, ensure_ascii=False)


def tokens_of(usage: dict) -> tuple[int, int]:
    """(input, output) tokens of a completion's `usage`; a count may be 12, 12.0 or "12", and is 0 where it is none."""
    counts = (re.match(r"\d{1,15}\b", str(usage.get(f"{name}_tokens"))) for name in ("prompt", "completion", "total"))
    asked, said, total = (int(count[0]) if count else 0 for count in counts)
    # What only the total counts, as some do with thoughts, is output, the dearer of the two.
    return asked, max(said, total - asked)


def text_of(message: dict) -> str:
    """What a message says. Of a content that is a list of parts, those that are no text are thoughts."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    return content.strip()


def outside_thoughts(text: str) -> str:
    """What a reasoning model says after its thoughts; raises Unusable if it did not come to their end."""
    said = CLOSING.split(text.rpartition(FINAL)[2])[-1].strip()
    if OPENING.search(said.partition("{")[0]):  # behind a brace it is the answer that speaks of a tag
        raise Unusable(CUT, text)
    wrapped = WRAPPER.fullmatch(said)
    return wrapped[2].strip() if wrapped else said


def read_object(text: str) -> object:
    """The one object that an answer consists of, fenced or not, after thoughts or prose; raises ValueError if none."""
    read = partial(json.loads, strict=False, object_pairs_hook=refuse_double_keys)  # raw newlines in strings will do
    try:
        return read(text)  # first the whole: its strings may speak of tags and fences
    except ValueError:
        alone = ALONE.fullmatch(outside_thoughts(text))
        return read(alone[1] if alone else "")


def refuse_double_keys(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads: an object that names a key twice could be read either way, so it is not read at all."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key twice")
    return fields


def probability_of_one(choice: dict, verdict: int) -> float:
    """P(verdict = 1) from the logprobs of the token that holds the digit; raises Unusable where they are not there.

    Every listed token that goes on with a digit, as " 1" or "1}", counts for it. Where the other digit is not among
    those listed, it gets what all of them leave over.
    """
    try:
        tokens = choice["logprobs"]["content"]
        number, prefix, digit = find_digit(tokens)
        listed = {}
        for token in [*(tokens[number].get("top_logprobs") or []), tokens[number]]:
            listed[token["token"]] = math.exp(token["logprob"])

        mass = {"0": 0.0, "1": 0.0}
        for token, probability in listed.items():
            start = token.removeprefix(prefix).lstrip()[:1]
            if start in mass:
                mass[start] += probability
        other = str(1 - verdict)
        mass[other] = mass[other] or max(0.0, 1.0 - sum(listed.values()))
        if digit != str(verdict) or not all(map(math.isfinite, mass.values())):
            raise ValueError
        return mass["1"] / (mass["0"] + mass["1"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
        raise Unusable(NO_LOGPROBS, "leave --graded out, or name another endpoint") from e


def find_digit(tokens: list[dict]) -> tuple[int, str, str]:
    """(number of the token that holds the verdict's digit, what precedes the digit in that token, the digit).

    Tokens are joined as bytes, since one may hold part of a character.
    """
    pieces = []
    for token in tokens:
        as_bytes = token.get("bytes")
        pieces.append(token["token"].encode() if as_bytes is None else bytes(as_bytes))
    *_, last = re.finditer(rb'"verdict"\s*:\s*([01])', b"".join(pieces))  # the reason may speak of a verdict too
    start, number = 0, 0  # where the token begins, and which it is
    while start + len(pieces[number]) <= last.start(1):
        start += len(pieces[number])
        number += 1
    return number, pieces[number][: last.start(1) - start].decode(), last[1].decode()
