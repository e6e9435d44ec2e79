"""What an agent must answer with, and its strict reading."""

import json
import math
import re
from functools import lru_cache
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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


CUT, FILTERED, NO_LOGPROBS = "cut at the token limit", "content filter", "no logprobs of the verdict"
TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give


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
