"""The judge under principles, and their versions; the rubric's grades."""

from collections import Counter
from pathlib import Path

from pydantic import Field

from common.answers import WEIGHTS, GradedVerdict, Grades, Unusable, Verdict
from common.client import Client, settled
from common.records import Record, read
from common.run_folder import fail


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


EXCELLENT = 2.0  # least weighted mean of the grades


async def grade(judge: Client, row: dict, failures: Counter) -> None:
    """Add the rubric's grades to a row; None where none came."""
    try:
        answer = await judge.ask("rubric", Grades, query=row["query"], response=row["response"])
        row["grades"] = {name: getattr(answer, name) for name in WEIGHTS}
        row["quality"] = answer.quality
        row["excellent"] = int(row["quality"] >= EXCELLENT)
    except Unusable as e:
        failures[f"rubric: {e}"] += 1
        row["grades"], row["quality"], row["excellent"] = None, None, None


async def verdict(client: Client, row: dict, name: str, principles: list[str], failures: Counter) -> None:
    """Add the verdict under these principles to a row; None where none came."""
    try:
        row[name] = (await judge(client, row["query"], row["response"], principles)).verdict
    except Unusable as e:
        failures[f"{name}: {e}"] += 1
        row[name] = None
