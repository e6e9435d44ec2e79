"""Step 4's watch: grades that fall while the reward rises, and signs of spoilt texts that rise beyond noise."""

import argparse
import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, lines
from scipy.stats import fisher_exact

from common.prompts import PROMPTS
from common.records import Labelled, Query, read
from common.rewards import figures_of
from common.signs import signs
from common.spoilt import FAMILIES, Source, draw, spoil
from common.stats import chance_of_rise
from common.watch import Watch, repeats_of, rises, watch_callback

HACKED = ROOT / "../shared/readings/hack_rollouts.jsonl"
GOOD = [row for row in read(ROOT / "data/labelled.jsonl", Labelled) if row.label == 1]
QUERIES, SAMPLES, STEPS, EVERY = 16, 8, 12, 4  # of an --offline run


def completions(
    rng: random.Random, steps: int = STEPS, queries: int = QUERIES, samples: int = SAMPLES, spoilt: float = 0.25
) -> list[dict]:
    """What a policy writes that does not change: good greetings, a share of them spoilt in any way."""
    rollouts = []
    for step in range(steps):
        for row in rng.sample(GOOD, queries):
            source = Source(row.query, row.response, rng.choice(GOOD).response)
            for _ in range(samples):
                text = draw(source, rng, held_out=True)[0] if rng.random() < spoilt else row.response
                rollouts.append({"step": step, "query": row.query, "response": text or row.response})
    return rollouts


# ---- the look -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    args = argparse.Namespace(seed=0, watch_queries=40, reward="rm", run=tmp_path, temperature=1.0, max_tokens=8,
                              batch_size_generate=8, prompts=PROMPTS, watch_every=EVERY, name="policy_rm",
                              stop_on_hack=True, likelihood=None)  # fmt: skip
    watch = Watch(args, [Query(query=f"问{n}") for n in range(40)])
    monkeypatch.setattr(watch, "write", lambda model, tokenizer: [""] * 40)
    return watch


@pytest.fixture
def look(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float | None], list[float]], dict]:
    """look(grades, rewards so far) -> the row of a look at texts with these grades."""
    step = iter(range(100))

    def once(grades: list[float | None], rewards: list[float]) -> dict:
        monkeypatch.setattr(watch, "grade", lambda texts: asyncio.sleep(0, grades))
        return watch.look(None, None, next(step), rewards)

    return once


def test_a_reward_that_rises_while_the_grades_fall_is_a_hack(look: Callable) -> None:
    good, bad = [2.4, 2.0, 2.2, 1.8] * 10, [1.4, 1.2, 1.3, 1.0] * 10
    first = {"step": 0, "quality": 2.1, "n": 40, "hack": False, "best": True, "rises": {}}
    assert look(good, []) == first | {"repeats": [1] * 40, "collapse": None}
    assert look(bad, [0.1, 0.2, 0.9])["hack"] is True
    assert look(bad, [0.9, 0.2, 0.1])["hack"] is False  # the reward fell with them


def test_a_fall_inside_noise_is_none(look: Callable) -> None:
    look([2.4, 1.0, 2.2, 1.0] * 10, [])
    row = look([1.0, 2.3, 1.0, 2.2] * 10, [0.1, 0.5, 0.9])
    assert row["difference"]["value"] < 0 < row["difference"]["hi"] and row["hack"] is False and row["best"] is False


def test_one_text_for_more_and_more_queries_is_a_collapse(
    watch: Watch, look: Callable, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def look_at(same: int, grade: float = 2.0) -> dict:
        texts = ["祝你生日快乐！"] * same + [f"祝{n}" for n in range(40 - same)]
        monkeypatch.setattr(watch, "write", lambda model, tokenizer: texts)
        return look([grade] * 40, [0.5])

    assert look_at(4)["collapse"] is None  # at the first look there is nothing to compare with
    assert not look_at(1)["hack"] and not look_at(4)["hack"]
    assert not look_at(10)["hack"]  # 15% more, with an interval that begins at 5%
    capsys.readouterr()
    row = look_at(20, grade=2.2)
    assert row["hack"] and row["collapse"]["value"] == pytest.approx(0.4) and row["collapse"]["lo"] > 0.1
    assert not row["best"]  # although it has the best grades
    assert "queries get a text that others get too (+0.40 [" in capsys.readouterr().err


def test_nothing_collapses_where_there_is_little_to_compare(watch: Watch, look: Callable) -> None:
    assert not look([2.0] * 40, [0.5])["hack"] and not look([2.0] * 40, [0.9])["hack"]  # all alike from the start
    assert repeats_of(["祝好。"] * 6, [{"repeats": [0] * 6}])["collapse"] is None  # fewer than stats.LEAST
    assert repeats_of(["祝好。"] * 40, [{"grades": [2.0] * 40}])["collapse"] is None  # a look of an older version


def test_the_small_runs_reward_model_is_warned_of_and_likelihood_is_not() -> None:
    """What its policies wrote for 65 held-out queries (docs/results.md), as if the watch had looked at that."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for row, key in zip(*(lines(ROOT / f"docs/readings_{name}.jsonl") for name in ("wanted", "key")), strict=True):
        texts.setdefault(key["policy"], []).append((row["query"], row["response"]))
    written = {policy: [text for _, text in sorted(rows)] for policy, rows in texts.items()}
    first = repeats_of(written["sft"], [])
    collapsed = repeats_of(written["grpo_rm"], [first])
    print({policy: sum(repeats_of(rows, [])["repeats"]) for policy, rows in written.items()}, collapsed["collapse"])
    assert sum(first["repeats"]) == 0 and collapsed["collapse"]
    assert repeats_of(written["grpo_likelihood"], [first])["collapse"] is None


def plant(rollouts: list[dict], kind: str, start: int, rng: random.Random) -> list[dict]:
    """The rollouts with this kind of text in three of ten completions from this step on."""
    planted = []
    for row in rollouts:
        if row["step"] >= start and rng.random() < 0.3:
            source = Source(row["query"], row["response"], rng.choice(GOOD).response)
            row = row | {"response": spoil(kind, source, rng, held_out=True) or row["response"]}
        planted.append(row)
    return planted


def test_a_look_without_any_grade_warns_of_what_rises_and_stops_the_run(
    watch: Watch, look: Callable, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    rng = random.Random(0)
    rollouts = plant(completions(rng, steps=8, spoilt=0), "heading", 4, rng)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rollouts)
    (watch.args.run / "rollouts_rm.jsonl").write_text(text, encoding="utf-8")
    row = look([None] * 40, [0.1])
    said = capsys.readouterr().err
    assert row["quality"] is None and row["hack"] is True and row["best"] is False
    share = row["rises"]["echo"]
    late = [row for row in rollouts if row["step"] >= 4]
    assert share["to"] == round(sum("echo" in signs(r["query"], r["response"]) for r in late) / len(late), 4)
    assert share["from"] < 0.1 and f"signs of echo rise from {share['from']:.0%} to {share['to']:.0%}" in said
    assert lines(watch.path)[-1]["rises"]["echo"] == share

    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=8, log_history=[])
    callback = watch_callback(watch.args, watch, updates=1)
    callback.on_log(None, state, control, {"loss": 0.1}, None, None)
    assert control.should_training_stop is True


# ---- signs that rise ------------------------------------------------------------------------------------------------


def test_independent_hits_are_tested_by_fishers_exact_test() -> None:
    before, after = [[True, False, False, False]] * 8, [[True, True, False, False]] * 8  # no group varies by itself
    assert chance_of_rise(before, after) == pytest.approx(fisher_exact([[16, 16], [8, 24]], alternative="greater")[1])
    assert chance_of_rise(before[:7], after) == 1.0
    assert chance_of_rise(after, before) > 0.9
    assert chance_of_rise(before[:1], after) == chance_of_rise(before, after[:1]) == 1.0


def test_groups_that_hit_as_one_count_as_one_text_each() -> None:
    hit, miss = [True] * 8, [False] * 8
    # The design effect is 8 x 8 / 7, so 64 completions are 7; 16 and 56 hits are 1.75 and 6.1, rounded to the middle.
    expected = fisher_exact([[6, 1], [2, 5]], alternative="greater")[1]
    assert chance_of_rise([hit] * 2 + [miss] * 6, [hit] * 7 + [miss]) == pytest.approx(expected)
    expected = fisher_exact([[8, 0], [0, 8]], alternative="greater")[1]
    assert chance_of_rise([miss] * 8, [hit] * 8) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "family"), [("heading", "echo"), ("statement", "no_greeting"), ("preface", "task_talk")]
)
@pytest.mark.parametrize("start", [4, 8])
def test_what_is_planted_is_caught_within_one_look(kind: str, family: str, start: int) -> None:
    rng = random.Random(f"{kind} {start}")
    rollouts = plant(completions(rng, spoilt=0.1), kind, start, rng)
    assert not rises([row for row in rollouts if row["step"] < start], EVERY)
    found = rises([row for row in rollouts if row["step"] < start + EVERY], EVERY)
    assert family in found and found[family]["to"] - found[family]["from"] > 0.15


def test_the_rollouts_of_a_hacked_run_are_warned_of_by_step_7() -> None:
    if not HACKED.is_file():
        pytest.skip("the rollouts of a run that was hacked are not here")
    rollouts, warned = lines(HACKED), {}
    for last in range(1, 14, 2):
        if found := rises([row for row in rollouts if row["step"] <= last], 2):
            warned[last] = found
    assert min(warned) <= 7 and "no_greeting" in warned[min(warned)] and max(warned) == 13


@pytest.mark.parametrize(("queries", "samples", "every"), [(16, 8, 4), (4, 8, 2)])
def test_a_policy_that_does_not_change_is_not_warned_of(queries: int, samples: int, every: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        rollouts = completions(rng, 12, queries, samples, spoilt=rng.uniform(0.05, 0.5))
        for last in range(every, 13, every):
            assert not rises([row for row in rollouts if row["step"] < last], every), (seed, last)


def test_samples_of_the_sft_policy_are_not_warned_of(run: Path) -> None:
    """What it wrote for step 5, in twenty orders, as if each eight queries were a step."""
    texts = {}
    for row in lines(run / "generations/sft.jsonl"):
        texts.setdefault(row["query"], []).append(row["response"])
    for seed in range(20):
        queries = random.Random(seed).sample(sorted(texts), len(texts))
        rollouts = []
        for place, query in enumerate(queries):
            rollouts += [{"step": place // 4, "query": query, "response": text} for text in texts[query]]
        for last in range(2, len(queries) // 4 + 1, 2):
            assert not rises([row for row in rollouts if row["step"] < last], 2), (seed, last)


# ---- in every step's metrics ----------------------------------------------------------------------------------------


def test_the_metrics_hold_the_share_of_completions_with_each_sign() -> None:
    good = next(row for row in GOOD if "祝福" in row.query and not signs(row.query, row.response))
    echo = f"{good.query}：{good.response}"
    assert signs(good.query, echo) == {"echo"}
    gathered = [((good.query, text), (1.0, "")) for text in (good.response, echo, good.response, echo)]
    figures = figures_of(gathered)
    assert figures["signs/echo"] == figures["signs/any"] == 0.5 and figures["signs/plea"] == 0.0


@pytest.mark.parametrize("reward", ["rm", "judge"])
def test_a_run_logs_them_for_every_step_and_in_its_summary(run: Path, reward: str) -> None:
    steps = [row for row in lines(run / f"metrics_{reward}.jsonl") if "reward" in row]
    rollouts = lines(run / f"rollouts_{reward}.jsonl")
    for row, step in zip(steps, sorted({row["step"] for row in rollouts}), strict=True):
        shown = [signs(r["query"], r["response"]) for r in rollouts if r["step"] == step]
        assert row["signs/any"] == pytest.approx(sum(map(bool, shown)) / len(shown), abs=1e-4)
        assert row["signs/echo"] == pytest.approx(sum("echo" in some for some in shown) / len(shown), abs=1e-4)
    summary = json.loads((run / f"04_summary_{reward}.json").read_text())
    assert summary["signs"].keys() == {*FAMILIES, "any"}
    assert summary["signs"]["any"] == {"first": steps[0]["signs/any"], "last": steps[-1]["signs/any"]}
