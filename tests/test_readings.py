"""Readings as a yardstick: whose acceptances the reader shares, in figures made by hand and on the shipped rows."""

import pytest
from conftest import ROOT

from common.records import Labelled, Reference, read
from common.report.readings import Reading, reader_s_grade, readings_figures
from common.stats import correlation

LABELLED = [{"response": "长" * n, "label": int(n > 10), "part": "reflect"} for n in range(1, 21)]


def reading(number: int, acceptable: int, grade: int, **scores: object) -> dict:
    grades = dict.fromkeys(("language", "creativity", "emotion", "culture", "richness"), grade)
    row = {"query": f"q{number}", "response": "短" * (number % 20 + 1), "acceptable": acceptable}
    return row | grades | {"excellent": None, "quality": None} | scores


def test_an_evaluator_stands_or_falls_with_what_the_reader_shares() -> None:
    """Of 40 rows 20 are acceptable; the judge accepts 30, 20 of them shared, the rubric 25, 5 shared, the agents 3."""
    rows = []
    for number in range(40):
        good = int(number < 20)
        scores = {
            "judge": int(number < 30),
            "excellent": int(number >= 15),
            "quality": 3.0 - good,
            "agents": number < 3,
        }
        rows.append(reading(number, good, 1 + 2 * good, **scores))
    figures = readings_figures(rows, LABELLED)
    assert figures.keys() == {"rubric", "judge", "agents", "null: length", "null: n-grams"}
    judge, rubric, agents = (figures[name] for name in ("judge", "rubric", "agents"))
    assert (judge["shared"]["value"], judge["shared"]["n"], judge["recall"]) == (0.6667, 30, 1.0)
    assert (rubric["shared"]["value"], rubric["shared"]["n"]) == (0.2, 25)
    assert [judge["standing"], rubric["standing"], agents["standing"]] == ["evidence", "no evidence", "unknown"]
    assert rubric["grades"]["value"] == -1.0 and judge["grades"]["value"] == pytest.approx(0.577, abs=1e-3)
    assert judge["kappa"] == 0.5 and judge["good"] == 20


def test_correlation_leaves_out_what_has_no_value_and_needs_two_sides_that_vary() -> None:
    assert correlation([1, 2, None, 3], [2, 4, 9, 6], list("abcd"))["value"] == 1.0
    assert correlation([1, 2, None, 3], [2, 4, 9, 6], list("abcd"))["n"] == 3
    assert correlation([1, 1, 1], [1, 2, 3], list("abc")) == {"value": None, "lo": None, "hi": None, "n": 3}
    wide = correlation([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], list("abcdef"))
    assert wide["lo"] < wide["value"] < wide["hi"] <= 1


def test_the_shipped_readings_are_whole() -> None:
    rows = read(ROOT / "data/readings.jsonl", Reading, unique=False)
    assert len(rows) == 218 and {row.writer for row in rows} >= {"tiny_base", "tiny_sft", "Qwen2.5-Coder-1.5B-Instruct"}
    grades = {label: [reader_s_grade(row.model_dump()) for row in rows if row.acceptable == label] for label in (0, 1)}
    assert sum(grades[1]) / len(grades[1]) > sum(grades[0]) / len(grades[0]) + 0.3
    assert readings_figures([], LABELLED) == {}
    others = read(ROOT / "data/references.jsonl", Reference) + read(ROOT / "data/labelled.jsonl", Labelled)
    assert not {row.response for row in rows} & {row.response for row in others}
