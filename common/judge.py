"""Whoever judges greetings with one question each: the judge under written principles, and the rubric.

`judge_greeting` is reward B of the paper: a verdict under principles that step 3 refines (prompts/detector.md: the
paper calls this judge the Detector, because the Generator tries to fool it). `grade_greeting` is the rubric's five
grades, 1 to 3 (prompts/rubric.md). Neither is the Judge of step 1's debate, which is in debate.py (prompts/judge.md).
"""

from collections import Counter
from pathlib import Path

from pydantic import Field

from common import records
from common.answers import WEIGHTS, GradedVerdict, Grades, Verdict
from common.client import Client
from common.failures import Unusable
from common.run_folder import fail

EXCELLENT = 2.0  # least weighted mean of the five grades


class Version(records.Record):
    """A line of principles.jsonl, as far as the judge needs it."""

    principles: list[str] = Field(min_length=1)
    accepted: bool

    def content(self) -> tuple:
        return (self.principles, self.model_extra.get("version"))


def current_principles(path: Path) -> list[str]:
    """The principles of the last accepted version in principles.jsonl."""
    versions = records.read(path, Version, made_by=f"python 03_refine_judge.py --run {path.parent}")
    accepted = [version for version in versions if version.accepted]
    if not accepted:
        fail(f"{path} has no accepted version; make it again: python 03_refine_judge.py --run {path.parent} --redo")
    return accepted[-1].principles


async def judge_greeting(client: Client, query: str, response: str, principles: list[str], again: int = 0) -> Verdict:
    """1 if the response satisfies every principle, else 0, with the reason; asked at temperature 0.

    With --graded the answer is a GradedVerdict: it also has P(verdict = 1). Another `again` asks for a new one.

    Raises:
        Unusable: the endpoint gave no usable verdict. That is a failure to record, never a verdict.
    """
    answer = GradedVerdict if client.args.graded else Verdict
    return await client.ask("detector", answer, sample=again, query=query, response=response, principles=principles)


async def grade_greeting(client: Client, query: str, response: str) -> Grades:
    """The rubric's grades; `quality` is their weighted mean. Raises Unusable as `judge_greeting` does."""
    return await client.ask("rubric", Grades, query=query, response=response)


async def add_verdict(client: Client, row: dict, name: str, principles: list[str], failures: Counter) -> None:
    """Add to a row the verdict under these principles; None where none came, the reason counted."""
    try:
        verdict = await judge_greeting(client, row["query"], row["response"], principles)
        row[name] = verdict.verdict
    except Unusable as e:
        failures[f"{name}: {e}"] += 1
        row[name] = None


async def add_grades(client: Client, row: dict, failures: Counter) -> None:
    """Add to a row `grades`, `quality` and `excellent` by the rubric; None where none came, the reason counted."""
    try:
        grades = await grade_greeting(client, row["query"], row["response"])
        row["grades"] = {name: getattr(grades, name) for name in WEIGHTS}
        row["quality"] = grades.quality
        row["excellent"] = int(grades.quality >= EXCELLENT)
    except Unusable as e:
        failures[f"rubric: {e}"] += 1
        row["grades"], row["quality"], row["excellent"] = None, None, None
