"""What a reader says of machine-written greetings, as a yardstick: an evaluator may agree with labels, and yet accept
what a model writes and nobody would send.
"""

from typing import Literal

from pydantic import Field

from common import records, stats
from common.answers import WEIGHTS, weighted_mean
from common.report.evaluators import verdicts_on

FEW = 20  # acceptances: of fewer nothing is concluded
SHARED = 0.5  # of an evaluator's acceptances those that the reader shares, below which it is no evidence
Grade = Literal[1, 2, 3]


class Reading(records.Record):
    """A line of data/readings.jsonl: a greeting, who wrote it, whether a reader would send it, and the five grades."""

    query: str = Field(min_length=1)
    response: str = Field(min_length=1)
    writer: str
    acceptable: Literal[0, 1]
    language: Grade
    creativity: Grade
    emotion: Grade
    culture: Grade
    richness: Grade


def reader_s_grade(row: dict) -> float:
    """The weighted mean of the reader's five grades, as the rubric's are weighted."""
    return weighted_mean({name: row[name] for name in WEIGHTS})


def standing(figures: dict) -> str:
    """What an evaluator's acceptances are worth: "evidence", "no evidence", "unknown" if they are few."""
    accepted = figures["shared"]["n"]
    if accepted < FEW:
        return "unknown"
    return "evidence" if figures["shared"]["value"] >= SHARED else "no evidence"


def readings_figures(readings: list[dict], labelled: list[dict]) -> dict[str, dict]:
    """Evaluator -> its agreement with the reader, on rows that evaluators have scored.

    `shared` is the share of its acceptances that the reader shares (precision, with an interval), `grades` the
    correlation of its grade, or else its verdict, with the reader's. Scores are cut, and the null baselines fitted, on
    labelled rows.
    """
    if not readings:
        return {}
    labels, queries = stats.column(readings, "acceptable"), stats.column(readings, "query")
    grades = [reader_s_grade(row) for row in readings]
    # Evaluators that say more than yes or no.
    finer = {"rubric": "quality", "reward_model": "reward_model", "likelihood": "likelihood"}
    table = {}
    for name, verdicts in verdicts_on(readings, labelled).items():
        shared = [label for label, verdict in zip(labels, verdicts, strict=True) if verdict]
        own = stats.column(readings, finer[name]) if name in finer else verdicts
        figures = stats.agreement(labels, verdicts, queries)
        figures |= {"shared": stats.rate(sum(shared), len(shared)), "grades": stats.correlation(own, grades, queries)}
        table[name] = figures | {"good": sum(labels), "standing": standing(figures)}
    return table
