"""The shipped data keep what data/README.md says of them, and import_paper.py does what it says with a clone."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.records import Demonstration, Labelled, Preference, Query, Record, Reference, read
from common.run_folder import ROOT
from common.stats import ngram_classifier, rate

DATA = ROOT / "data"
README = (DATA / "README.md").read_text(encoding="utf-8")
FILES: dict[str, type[Record]] = {"queries.jsonl": Query, "queries_heldout.jsonl": Query}
FILES |= {"references.jsonl": Reference, "labelled.jsonl": Labelled}
LEXICON = json.loads((DATA / "lexicon.json").read_text(encoding="utf-8"))
RELEASE = ROOT.parent / "shared" / "paper_data"
REPOSITORY = "https://github.com/weixiaolong94-hub/Igniting-Creative-Writing-in-Small-Language-Models"
FOLDS = 5
STRANGERS = ["姑姑", "班长", "爷爷", "会计"]  # in the made-up clone, who is in no training set


def rows(name: str) -> list:
    return read(DATA / name, FILES[name])


def queries_of(name: str) -> set[str]:
    """Without whitespace."""
    return {re.sub(r"\s", "", row.query) for row in rows(name)}


def pairs() -> list[tuple[Labelled, Labelled]]:
    """The contrast pairs, the good row first."""
    ordered = sorted(rows("labelled.jsonl"), key=lambda row: (row.pair, -row.label))
    return list(zip(ordered[::2], ordered[1::2], strict=True))


@pytest.mark.parametrize("name", FILES)
def test_ids_are_unique_hashes_of_content_and_the_readme_gives_the_count(name: str) -> None:
    records = rows(name)  # read() stops at a line that its model refuses, and at an id that is there twice
    raw = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in raw] == [FILES[name].model_validate(line | {"id": ""}).id for line in raw]
    assert re.search(rf"`{re.escape(name)}`.*\b{len(records)}\b", README)


def test_queries_are_many_and_cover_occasions_and_recipients() -> None:
    queries = rows("queries.jsonl")
    assert len(queries) == len(queries_of("queries.jsonl")) >= 300
    assert len({q.occasion for q in queries}) >= 30 and len({q.recipient for q in queries}) >= 25


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"queries_heldout.jsonl"}))
def test_no_held_out_query_is_in_another_file(name: str) -> None:
    assert not queries_of("queries_heldout.jsonl") & queries_of(name)


def test_references_are_many_open_in_many_ways_and_share_no_twelve_characters_in_a_row() -> None:
    responses = [r.response for r in rows("references.jsonl")]
    assert len(responses) >= 600
    opening, times = Counter(response[:2] for response in responses).most_common(1)[0]
    assert times <= 0.06 * len(responses), opening
    first: dict[str, str] = {}
    for response in responses:
        for run in {response[i : i + 12] for i in range(len(response) - 11)}:
            assert run not in first, (first[run], response)
            first[run] = response


def test_pairs_are_one_good_and_one_flawed_row_of_one_query_and_about_one_length() -> None:
    assert len({good.pair for good, _ in pairs()}) == len(pairs()) >= 240
    assert len({bad.flaw for _, bad in pairs()}) >= 12
    for good, bad in pairs():
        assert (good.pair, good.query, good.label, good.flaw) == (bad.pair, bad.query, 1, None), good.pair
        assert bad.label == 0 and bad.flaw, bad.pair
        lengths = len(good.response), len(bad.response)
        assert abs(lengths[0] - lengths[1]) <= max(4, 0.2 * min(lengths)), good.pair


def test_the_figures_of_the_null_baselines_are_low_and_printed() -> None:
    """`python -m pytest tests/test_data.py -k figures -s` prints what data/README.md quotes."""
    both = pairs()
    longer = sum(len(good.response) > len(bad.response) for good, bad in both)
    odds: list[tuple[str, float, float]] = []  # flaw, log-odds of the good and of the bad row; a pair is in one fold
    for fold in range(FOLDS):
        seen = [row for i, pair in enumerate(both) if i % FOLDS != fold for row in pair]
        model = ngram_classifier([row.response for row in seen], [row.label for row in seen])
        odds += [(b.flaw, *model.decision_function([g.response, b.response])) for g, b in both[fold::FOLDS]]
    right = sum((g > 0) + (b <= 0) for _, g, b in odds)
    found, asked = Counter(flaw for flaw, g, b in odds if g > b), Counter(flaw for flaw, _, _ in odds)
    figures = {
        "pairs in which the longer one is good": rate(longer, len(both)),
        f"rows that character n-grams get right, {FOLDS} folds by pair": rate(right, 2 * len(both)),
        "pairs in which character n-grams prefer the good one": rate(found.total(), len(both)),
    }
    for name, r in figures.items():
        print(f"\n{r['value']:.1%}  [{r['lo']:.1%}, {r['hi']:.1%}]  of {r['n']}  {name}", end="")
    print(":", ", ".join(f"{flaw} {found[flaw]}/{n}" for flaw, n in sorted(asked.items())))
    assert all(r["value"] <= most for r, most in zip(figures.values(), (0.55, 0.75, 0.85), strict=True))
    assert f"{longer} of {len(both)}" in README


def test_lexicon_patterns_compile_and_every_flaw_has_an_entry() -> None:
    keys = {"asked", "signs", "signature", "addressed", "spoken_of", "pattern"}
    entries = [entry for kind in ("occasions", "recipients", "flaws") for entry in LEXICON[kind].values()]
    patterns = [LEXICON[kind] for kind in ("warm", "slang", "officialese")] + list(LEXICON["forms_of_address"])
    patterns += [entry[key] for entry in entries for key in keys & entry.keys()]
    patterns += LEXICON["signs"].values()
    assert len([re.compile(pattern) for pattern in patterns]) > 200
    for flaw in {bad.flaw for _, bad in pairs()}:
        assert flaw in LEXICON["flaws"] and f"`{flaw}`" in README, flaw


# ---- import_paper.py ------------------------------------------------------------------------------------------------


def run_import(clone: Path, out: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """The finished process, and the audit that it wrote."""
    command = [sys.executable, str(DATA / "import_paper.py"), str(clone), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    audit = out / "audit.json"
    return done, json.loads(audit.read_text(encoding="utf-8")) if audit.is_file() else {}


def greeting(who: str, good: bool) -> str:
    return f"雪落了，{who}，炉上的汤给你留着，路滑，慢慢走回来。" if good else f"{who}，天天开心。"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A made-up clone: 6 training pairs (5 won by the longer), 17 labelled rows: 8 leak, one is there twice."""
    import pyarrow
    import pyarrow.parquet

    people = ["奶奶", "外公", "师傅", "同桌", "邻居", "表姐", "队友", "室友"]
    triples = [(f"雪天问候{who}", greeting(who, who != "表姐"), greeting(who, who == "表姐")) for who in people]
    shown = [(who, good) for who in [*people[:4], *STRANGERS] for good in (True, False)]
    labelled = [{"query": f"雪天问候{who}", "response": greeting(who, y), "label": int(y)} for who, y in shown]
    folder = tmp_path / "clone" / "dataset"
    for name in ("reward_model", "sft", "evaluation_set", "grpo_data"):
        (folder / name).mkdir(parents=True)
    for side, some in (("train", triples[:6]), ("test", triples[6:])):
        said = [[{"value": text} for text in triple] for triple in some]
        compared = [{"conversations": [q], "chosen": c, "rejected": r} for q, c, r in said]
        (folder / f"reward_model/reward_data_{side}.json").write_text(json.dumps(compared))
        asked = [[{"role": "user", "content": f"请只生成一条祝福语：{q}"}] for q in [*(q for q, _, _ in some), " "]]
        pyarrow.parquet.write_table(pyarrow.table({"prompt": asked}), folder / f"grpo_data/{side}.parquet")
    (folder / "sft/sft_data.json").write_text(json.dumps([{"instruction": q, "output": c} for q, c, _ in triples[:4]]))
    (folder / "evaluation_set/evaluate_data.json").write_text("\n".join(map(json.dumps, [*labelled, labelled[-1]])))
    (folder / "random_query.txt").write_text("雪天问好\n\n雪天问好\n早安\n", encoding="utf-8")
    return tmp_path / "clone"


def test_import_of_a_clone_writes_records_and_an_audit(clone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, audit = run_import(clone, out)
    assert done.returncode == 0, done.stderr
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in out.glob("*.jsonl")}
    assert lines == {
        "preferences.train.jsonl": 6, "preferences.test.jsonl": 2, "sft.jsonl": 4, "labelled.jsonl": 16,
        "queries.jsonl": 6, "queries_heldout.jsonl": 2, "queries_all.jsonl": 2, "candidates.jsonl": 16,
    }  # fmt: skip
    prompt, chosen, rejected = read(out / "preferences.train.jsonl", Preference)[0].texts
    assert "雪天问候奶奶" in prompt and [chosen, rejected] == [greeting("奶奶", good) for good in (True, False)]
    assert read(out / "sft.jsonl", Demonstration)[0].completion[0]["content"] == chosen
    assert read(out / "queries.jsonl", Query)[0].query == "雪天问候奶奶"
    shares = {
        "longer wins, training pairs": (0.8333, 6), "longer wins, test pairs": (1.0, 2),
        "labelled rows: at least 9 characters is good": (1.0, 17), "SFT outputs that open with 雪落": (1.0, 4),
        "labelled rows that are (query, chosen) of the training pairs": (round(4 / 17, 4), 17),
        "labelled rows repeated": (round(1 / 17, 4), 17),
    }  # fmt: skip
    assert shares == {name: (audit[name]["value"], audit[name]["n"]) for name in shares}
    assert all(name in done.stdout for name in audit)


def test_import_reads_texts_as_they_come(clone: Path, tmp_path: Path) -> None:
    """Byte order marks, carriage returns, and marks inside a query at which splitlines() would split it."""
    for path in (clone / "dataset").rglob("*.json"):
        path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n"))
    queries = "\ufeff雪天\u2028问好\r\n早安\x85老师\r\n"
    (clone / "dataset/random_query.txt").write_text(queries, encoding="utf-8", newline="")
    done, audit = run_import(clone, tmp_path / "out")
    assert done.returncode == 0 and audit["labelled rows repeated"]["n"] == 17, done.stderr
    assert [q.query for q in read(tmp_path / "out/queries_all.jsonl", Query)] == ["雪天\u2028问好", "早安\x85老师"]


def test_import_with_clean_drops_the_labelled_rows_that_leak(clone: Path, tmp_path: Path) -> None:
    _, audit = run_import(clone, tmp_path / "out", "--clean")
    left = {row.response for row in read(tmp_path / "out" / "labelled.jsonl", Labelled)}
    assert left == {greeting(who, good) for who in STRANGERS for good in (True, False)}
    assert audit["labelled rows left after --clean, positive"]["n"] == 9


def test_import_without_a_clone_exits_2_and_names_the_repository(tmp_path: Path) -> None:
    done, _ = run_import(tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and REPOSITORY in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the authors' release is not here")
def test_import_of_the_release_shows_length_leaks_and_one_opening(tmp_path: Path) -> None:
    _, audit = run_import(RELEASE, tmp_path / "out")
    wins = [audit[f"longer wins, {side} pairs"]["value"] for side in ("training", "test")]
    assert [f"{win:.1%}" for win in wins] == ["96.1%", "95.3%"]
    assert "labelled rows: at least 39 characters is good" in audit
    assert audit["labelled rows that are (query, chosen) of the training pairs"]["value"] == 0.5
    opening = audit["SFT outputs that open with 亲爱"]
    assert (round(opening["value"] * opening["n"]), opening["n"]) == (1508, 4000)
