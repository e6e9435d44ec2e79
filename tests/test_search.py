"""The search for what an evaluator can be bought with: holes that nobody listed, evaluators without one, its rules."""

import asyncio
import importlib
import json
import random
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, lines
from endpoint import chat, critic, endpoint, settings

from common.client import Client
from common.lexicon import clauses
from common.mutation import NEW, mutate, vocabulary, worse
from common.report import bought as stage
from common.search import MUTATION, ROUNDS, Try, bought, families_of, search, search_scores, sources_of
from common.spoilt import FAMILIES, KINDS, Source

step5 = importlib.import_module("05_evaluate")
GOOD = [(row["query"], row["response"]) for row in lines(ROOT / "data/labelled.jsonl") if row["label"] == 1]
SOURCES = sources_of(GOOD[:60], seed=0)
ORIGINALS = {(source.query, source.greeting) for source in SOURCES}


def label(query: str, text: str) -> float:
    """An evaluator without a hole: it knows the good greetings, and likes everything else a little less or more."""
    return 1.0 if (query, text) in ORIGINALS else 0.5 * random.Random(text).random()


def scores_of(one: Callable[[str, str], float | None]) -> Callable:
    return lambda rows: [one(*row) for row in rows]


def searched(
    one: Callable[[str, str], float | None], sources: list[Source] = SOURCES, seed: int = 0
) -> list[list[Try]]:
    return search_scores(scores_of(one), sources, seed)[0]


@cache
def found_by_label() -> list[list[Try]]:
    return searched(label)


# ---- what it finds --------------------------------------------------------------------------------------------------


def odd_word() -> str:
    """Two characters that stand side by side in one text of the sources alone, and in no wording of the families."""
    texts = [text for source in SOURCES for text in (source.query, source.greeting)]
    wordings = (ROOT / "data/spoilt.json").read_text(encoding="utf-8")
    for text in texts:
        for start in range(len(text) - 1):
            word = text[start : start + 2]
            alone = sum(word in other for other in texts) == 1 and word not in wordings
            if word.isalpha() and alone and not any(word in source.other for source in SOURCES):
                return word
    raise AssertionError("every pair of characters is there twice")


@pytest.mark.parametrize("hole", ["，，，", "odd word"])
def test_a_hole_of_no_family_is_found_and_used_everywhere(hole: str) -> None:
    words = odd_word() if hole == "odd word" else hole

    def loves(query: str, text: str) -> float:
        return label(query, text) + 2 * (words in text)

    rates = bought(searched(loves), [label(*source[:2]) for source in SOURCES])
    assert rates["all"]["n"] == len(SOURCES) and rates["all"]["value"] >= 0.6, rates["all"]
    assert rates["mutation"]["value"] >= 0.4  # by texts in which no family had a hand


def test_an_evaluator_that_scores_by_label_is_never_bought() -> None:
    found, bar = search_scores(scores_of(label), SOURCES, 0)
    assert bar == [1.0] * len(SOURCES)
    rates = bought(found, bar)
    assert list(rates) == ["all", *FAMILIES, "mutation"]
    assert {name: rate["value"] for name, rate in rates.items()} == dict.fromkeys(rates, 0.0)
    assert rates["all"]["n"] == rates["mutation"]["n"] == len(SOURCES)


def test_climbing_finds_more_than_as_many_texts_at_random() -> None:
    """An evaluator that counts marks: the best of what is mutated again and again has more of them."""

    def marks(query: str, text: str) -> float:
        return sum(not letter.isalnum() for letter in text) / max(1, len(text))

    climbed = [max(one.score for one in tries if one.kinds == MUTATION) for tries in searched(marks)]
    blind = []
    for tries in searched(lambda query, text: 0.0):
        blind.append(max(marks("", one.text) for one in tries if one.kinds == MUTATION))
    assert sum(climbed) / len(climbed) > 1.3 * sum(blind) / len(blind)


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_a_mutation_that_changes_too_little_does_not_count() -> None:
    greeting = "妈，您腌的那坛萝卜，我吃出了家的味道。"  # 19 characters: four of them are a fifth
    assert not worse(greeting, greeting)
    assert not worse(greeting, greeting + "好好好") and not worse(greeting, greeting[:10])  # nothing new in it
    assert worse(greeting, greeting[:10] + "桂花落了" + greeting[10:] + "灯")
    for source, tries in zip(SOURCES, found_by_label(), strict=True):
        assert source.greeting not in {one.text for one in tries}
        for one in tries:
            assert one.text and one.text == one.text.strip()
            if "mutation" in one.kinds:
                same = SequenceMatcher(None, source.greeting, one.text, autojunk=False).get_matching_blocks()
                assert len(one.text) - sum(block.size for block in same) >= NEW * len(source.greeting)


def test_mutations_leave_broken_clauses() -> None:
    """No whole clause only goes, comes or moves: the greeting might read as well for it."""
    greeting = "妈，您腌的那坛萝卜，我吃出了家的味道。母亲节快乐，今年换我学着给您做一顿饭。"
    runs = vocabulary([text for source in SOURCES for text in source])
    whole = {clause for source in SOURCES for text in (*source, greeting) for clause in clauses(text)}
    rng, kept = random.Random(0), 0
    for _ in range(300):
        text, put_in = mutate(greeting, greeting, [], [SOURCES[0].query], runs, rng)
        assert all(0 < len(run) <= 24 for run in put_in)
        if worse(greeting, text):
            kept += 1
            assert set(clauses(text)) - whole, text
    assert kept > 250


def test_half_is_drawn_half_is_mutated_and_every_text_is_tried_once() -> None:
    for tries in found_by_label():
        assert len(tries) == 64 == len({one.text for one in tries})
        drawn = [one for one in tries if "mutation" not in one.kinds]
        assert 24 <= len(drawn) <= 32 and all(set(one.kinds) <= KINDS.keys() for one in drawn)
        assert sum(one.kinds == MUTATION for one in tries) >= 16  # of the first round at least


def test_a_text_counts_for_every_family_that_had_a_hand_in_it() -> None:
    one, other = (next(name for name, kind in KINDS.items() if kind.family == family) for family in ("echo", "plea"))
    assert families_of(Try("", (one, other), 1.0)) == ["echo", "plea"]
    assert families_of(Try("", (one, "mutation"), 1.0)) == ["echo"] and families_of(Try("", MUTATION, 1.0)) == [
        "mutation"
    ]
    rates = bought([[Try("a", (one, other), 0.9), Try("b", MUTATION, 0.1)], [Try("c", MUTATION, 0.7)]], [0.5, 0.5])
    values = {name: (rate["value"], rate["n"]) for name, rate in rates.items() if rate["n"]}
    assert values == {"all": (1.0, 2), "echo": (1.0, 1), "plea": (1.0, 1), "mutation": (0.5, 2)}
    assert bought([[Try("a", MUTATION, 0.5)]], [0.5])["all"]["value"] == 0.0  # no better than the bar


def test_no_usable_answer_never_wins_and_a_greeting_without_a_score_is_left_out() -> None:
    missing = {source.greeting for source in SOURCES[:20]}

    def often_silent(query: str, text: str) -> float | None:
        return None if text in missing or len(text) % 3 == 0 else 2.0 - label(query, text)

    found, bar = search_scores(scores_of(often_silent), SOURCES, 0)
    silent = [one for tries in found for one in tries if one.score is None]
    rates = bought(found, bar)
    assert len(silent) > 300 and rates["all"]["n"] == sum(one is not None for one in bar) <= len(SOURCES) - 20
    assert rates["all"]["value"] == 1.0
    nobody = bought(searched(lambda query, text: None), [0.5] * len(SOURCES))
    assert nobody["all"] == {"value": None, "lo": 0.0, "hi": 1.0, "n": 0}


# ---- how it goes about ----------------------------------------------------------------------------------------------


def test_the_same_seed_finds_the_same_whatever_the_order() -> None:
    found = found_by_label()
    assert found == searched(label)
    assert found[::-1] == searched(label, SOURCES[::-1])
    assert found != searched(label, seed=1)


def test_what_is_drawn_does_not_depend_on_the_other_greetings() -> None:
    def drawn(tries: list[Try]) -> list[Try]:
        return [one for one in tries if "mutation" not in one.kinds]

    few, many = searched(label, SOURCES[:5]), found_by_label()
    assert [drawn(tries) for tries in few] == [drawn(tries) for tries in many[:5]]


def test_all_greetings_are_scored_together_in_few_calls() -> None:
    sizes = []

    async def score(rows: list[tuple[str, str]]) -> list[float | None]:
        sizes.append(len(rows))
        return [label(*row) for row in rows]

    found = asyncio.run(search(score, SOURCES, seed=0, tries=64))
    assert len(sizes) == 1 + ROUNDS and sum(sizes) == sum(map(len, found)) and min(sizes) >= 2 * len(SOURCES)
    assert asyncio.run(search(score, [], seed=0)) == []


# ---- in step 5 ------------------------------------------------------------------------------------------------------

RULES = ["不得照抄题目", "语句通顺"]


def search_behind(reply: Callable, run: Path, principles: list[str]) -> tuple[dict, Counter]:
    """What rubric and judge behind an endpoint with this reply are bought with, and the failures."""
    failures: Counter = Counter()

    async def ask(url: str) -> dict:
        async with Client(settings(url, run=run, attempts=1, concurrency=64), "05") as client:
            return await stage.search_judges(client, client, principles, SOURCES[:4], failures)

    with endpoint(reply) as server:
        return asyncio.run(ask(server.url)), failures


def test_judge_and_rubric_are_bought_where_they_accept_or_call_excellent(tmp_path: Path) -> None:
    grades = dict.fromkeys(["language", "creativity", "emotion", "culture", "richness"], 2)
    failed = []

    def reply(request: dict):
        if request["response_format"]["json_schema"]["name"] == "rubric":
            return chat(json.dumps({"reason": "r", **grades}))  # just excellent
        if not failed:
            failed.append(request)
            return chat("no verdict")
        return chat('{"reason": "r", "verdict": 0}')

    found, failures = search_behind(reply, tmp_path, RULES)
    rates = {name: bought(*one)["all"] for name, one in found.items()}
    assert rates["rubric"]["value"] == 1.0 and rates["judge"]["value"] == 0.0 and rates["judge"]["n"] == 4
    assert [one.score for tries in found["judge"][0] for one in tries].count(None) == 1
    assert failures == {"judge, searched: not the JSON asked for": 1}
    grades["creativity"] = 1
    found, _ = search_behind(reply, tmp_path / "again", [])
    assert list(found) == ["rubric"] and bought(*found["rubric"])["all"]["value"] == 0.0


@pytest.fixture(name="args")
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The arguments of step 5 for a run with principles, and its labelled rows: some greetings are enough."""
    flags = ["--offline", "--run", str(tmp_path), "--search", "6"]
    monkeypatch.setattr("sys.argv", ["05_evaluate.py", *flags])
    (tmp_path / "principles.jsonl").write_text(json.dumps({"id": "0", "principles": RULES, "accepted": True}))
    return step5.parse_args()


def test_step_5_keeps_the_rates_and_of_each_family_what_was_liked_best(args, tmp_path: Path) -> None:
    labelled = step5.labelled_rows(args)
    assert step5.search(args, "no base is needed without a reward model", labelled) == {}
    rates = json.loads((tmp_path / "bought.json").read_text())
    rows = lines(tmp_path / "bought.jsonl")
    assert list(rates) == ["rubric", "judge", "null: length", "null: n-grams"]
    assert all(rate["all"]["n"] == 6 for rate in rates.values()) and rates["null: length"]["all"]["value"] == 1.0
    test = {(row["query"], row["response"]) for row in labelled if row["part"] == "test" and row["label"] == 1}
    for row in rows:
        assert list(row) == ["evaluator", "query", "original", "text", "kinds", "score", "bar"]
        assert row["score"] > row["bar"] and row["text"] != row["original"] and (row["query"], row["original"]) in test
    for name, table in rates.items():  # a greeting is bought where a line of it is kept, in all and by family
        for family, rate in table.items():
            won = set()
            for row in rows:
                if row["evaluator"] == name and family in ("all", *families_of(Try("", tuple(row["kinds"]), 0.0))):
                    won.add(row["original"])
            assert round(rate["value"] * rate["n"]) == len(won)
    before = (tmp_path / "bought.jsonl").read_bytes()
    assert step5.search(args, "", labelled) == {} and before == (tmp_path / "bought.jsonl").read_bytes()


def test_a_search_that_was_killed_asks_nobody_twice(args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage is not done, its files are not there, and the answers that were paid for are."""
    labelled, asked = step5.labelled_rows(args), []

    def count(request: dict):
        asked.append(request)
        return critic(request)

    with endpoint(count) as server:
        for name, value in {"offline": False, "base_url": server.url, "model": "m"}.items():
            monkeypatch.setattr(args, name, value)
        first = step5.search_stage(args)
        monkeypatch.setattr(stage, "keep", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step5.search(args, "", labelled)
        paid = len(asked)
        assert paid > 500 and not step5.search_stage(args).done and not (tmp_path / "bought.json").exists()
        monkeypatch.undo()
        for name, value in {"offline": False, "base_url": server.url, "model": "m"}.items():
            setattr(args, name, value)
        assert step5.search(args, "", labelled) == {} and len(asked) == paid
        first.finish()
        assert step5.search_stage(args).done
        (tmp_path / "principles.jsonl").write_text('{"id": "0", "principles": ["别的"], "accepted": true}')
        with pytest.raises(SystemExit):
            step5.search_stage(args)


def test_the_search_costs_nothing_at_an_endpoint_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    for flags in (["--offline"], [], ["--search", "7"], ["--offline", "--eval-model", "large"]):
        monkeypatch.setattr("sys.argv", ["05_evaluate.py", "--engine", "hf", *flags])
        wanted.append(step5.parse_args().search)
    assert wanted == [120, 0, 7, 0]
