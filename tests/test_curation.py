"""Step 1's own decisions: what is screened out, what is retrieved, which pairs and demonstrations are chosen."""

import importlib
import json
import random
import shutil
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script

from common import debate
from common.debate import Retrieval
from common.offline.tiny_model import tiny_policy
from common.records import Candidate, Reference, write

curation = importlib.import_module("01_curate_preferences")


def judged(number: int, query: int, length: int, label: int, opening: str = "愿你") -> curation.Judged:
    return curation.Judged(
        str(number), str(query), str(query), (opening + "春" * length)[:length], label, number % 5, ""
    )


def test_over_the_file_the_longer_text_wins_as_often_as_it_loses() -> None:
    """Accepted texts are longer nine times in ten; the pairs must not show it, and prefer lengths that are near."""
    rng, rows = random.Random(0), []
    for number in range(3000):
        label = rng.random() < 0.5
        length = rng.randint(30, 60) if label == (rng.random() < 0.9) else rng.randint(10, 40)
        rows.append(judged(number, number // 8, length, int(label)))
    pairs, _, gaps = curation.choose_pairs(Namespace(uses=2), rows)
    sides = Counter((len(a.response) > len(b.response)) - (len(a.response) < len(b.response)) for a, b in pairs)
    assert len(pairs) > 300 and sides[1] == sides[-1] > 50 and sum(gap > 0 for gap in gaps) > 0.7 * len(gaps)
    assert all((a.label, b.label) == (1, 0) and a.query == b.query for a, b in pairs)
    assert max(Counter(one.id for pair in pairs for one in pair).values()) <= 2
    anyhow = [(a, b) for a in rows for b in rows if a.query == b.query and a.label > b.label]
    near = [sum(curation.length_gap(pair) <= 0.2 for pair in some) / len(some) for some in (pairs, anyhow)]
    assert near[0] > near[1]


def test_where_only_longer_texts_win_there_are_no_pairs() -> None:
    rows = [judged(n, n // 2, 40 if n % 2 else 20, n % 2) for n in range(40)]
    pairs, left_out, _ = curation.choose_pairs(Namespace(uses=2), rows)
    assert not pairs and left_out == {row.id for row in rows}


def test_no_opening_begins_more_than_its_share_of_the_demonstrations() -> None:
    rows = [judged(n, n // 2, 20, 1, "亲爱" if n % 2 else f"{n:02d}"[-2:]) for n in range(200)]
    chosen = curation.choose_demonstrations(rows)
    assert len(chosen) == 100 == len({row.query for row in chosen})
    assert Counter(row.response[:2] for row in chosen)["亲爱"] <= 6
    free = [judged(n, n // 2, 20, 1, f"{n:03d}"[-2:]) for n in range(60)]
    best = {row.query: row.strengths for row in curation.choose_demonstrations(free)}
    assert all(best[row.query] >= row.strengths for row in free)


@pytest.fixture
def references() -> list[Reference]:
    return [Reference.model_validate(row) for row in lines(ROOT / "data/references.jsonl")]


def test_screening_says_why(tmp_path: Path, references: list[Reference]) -> None:
    texts = {
        "first": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭。",
        "same": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭。",
        "near": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭！",
        "other": "窗外落雪，屋里有茶，你我慢慢说话。",
        "copy": references[0].response, "cut": references[1].response[:-2],
    }  # fmt: skip
    rows = [Candidate(id=name, query="除夕", response=text) for name, text in texts.items()]
    rows.append(Candidate(id="elsewhere", query="中秋", response=texts["first"]))
    write(tmp_path / "candidates.jsonl", rows)
    args = Namespace(run=tmp_path, max_similar=0.9, max_copied=0.8)
    copied = "copies a reference"
    assert {c.id: reason for c, reason in curation.screen(args, references) if reason} == {
        "same": "duplicate", "near": "near-duplicate", "copy": copied, "cut": copied,
    }  # fmt: skip
    everything = Namespace(run=tmp_path, max_similar=1.0, max_copied=1.0)
    assert [c.id for c, reason in curation.screen(everything, references) if reason] == ["same"]


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(debate, "INDEX", tmp_path / "index")
    return Namespace(examples=3, embedding_model=None, shard=None)


def test_retrieval_finds_the_occasion_and_never_the_query_itself(args: Namespace, references: list[Reference]) -> None:
    own = [r.query for r in references[::20]]
    retrieve = Retrieval(args, references, own)
    for reference in references[::20]:
        found = retrieve(reference.query, reference.response)
        assert len(found) == 3 and all(r.query != reference.query and r.id != reference.id for r in found)
    hits = [
        sum(a.occasion == r.occasion for a in retrieve(r.query, "")) / 3
        for r in references[::20] if Counter(x.occasion for x in references)[r.occasion] > 6
    ]  # fmt: skip
    assert sum(hits) / len(hits) > 0.4  # by chance: about 0.03


def test_the_popular_come_first_among_the_near(args: Namespace) -> None:
    rows = [Reference(query="教师节祝福 老师", response=f"老师好{n}", popularity=n) for n in range(10)]
    rows += [Reference(query=f"中秋快乐 {n}", response=f"月圆{n}", popularity=1000) for n in range(60)]
    retrieve = Retrieval(args, rows, ["教师节祝福"])
    assert [r.response for r in retrieve("教师节祝福", "")] == ["老师好9", "老师好8", "老师好7"]
    assert [r.response for r in retrieve("教师节祝福", "老师好9")] == ["老师好8", "老师好7", "老师好6"]
    unpopular = [r.model_copy(update={"popularity": None}) for r in rows]
    found = Retrieval(args, unpopular, ["教师节祝福"])("教师节祝福", "")
    assert [r.response for r in found] == ["老师好0", "老师好1", "老师好2"]


def test_an_embedding_model_is_used_and_its_index_kept(
    args: Namespace, references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:

    args.embedding_model = str(tiny_policy())
    query = references[0].query
    first = Retrieval(args, references[:50], [query])(query, "")
    monkeypatch.setattr(debate, "Embedding", None)  # a second run must not need it
    again = Retrieval(args, references[:50], [query])(query, "")
    assert len(first) == 3 and [r.id for r in first] == [r.id for r in again]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[list, Path]:
    """(the flags of every part, the folder): 400 labelled greetings curated by one run, one/, and in three parts."""
    folder = tmp_path_factory.mktemp("shards")
    rows = (ROOT / "data/labelled.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    (folder / "candidates.jsonl").write_text("\n".join(rows[:400]) + "\n", encoding="utf-8")
    flags = ["--offline", "--samples", 0, "--candidates", folder / "candidates.jsonl"]
    for name, *part in (("one",), *((str(n), "--shard", f"{n}/3") for n in (1, 2, 3))):
        done = run_script("01_curate_preferences.py", *flags, "--run", folder / name, *part)
        assert done.returncode == 0, done.stderr
    return flags, folder


def test_three_shards_merged_are_one_run(shards: tuple[list, Path], tmp_path: Path) -> None:
    flags, folder = shards
    merging = [*flags, "--run", tmp_path / "run", "--merge", *(folder / name for name in "312")]
    done = run_script("01_curate_preferences.py", *merging)
    assert done.returncode == 0, done.stderr
    for name in ("preferences.jsonl", "sft.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "one" / name).read_bytes()
    asked = [{row["query"] for row in lines(folder / name / "candidates.jsonl")} for name in "123"]
    assert all(asked) and not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    merged, one = (json.loads((run / "01_summary.json").read_text()) for run in (tmp_path / "run", folder / "one"))
    for name in ("candidates", "judged", "accepted", "pairs", "fates", "ledger", "agreement_with_given_labels"):
        assert merged[name] == one[name], name
    again = run_script("01_curate_preferences.py", *merging)
    assert again.returncode == 0 and "done already" in again.stdout


@pytest.mark.parametrize("wrong", ["missing", "twice", "other flags", "unfinished", "same id", "whole"])
def test_what_is_no_set_of_shards_is_refused(shards: tuple[list, Path], tmp_path: Path, wrong: str) -> None:
    flags, folder = shards
    for name in "123":
        shutil.copytree(folder / name, tmp_path / name)
    if wrong == "unfinished":
        with (tmp_path / "3/judgements.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n")
    if wrong == "same id":
        with (tmp_path / "3/candidates.jsonl").open("a", encoding="utf-8") as file:
            file.write((tmp_path / "1/candidates.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    names = {"missing": "13", "twice": "1223"}.get(wrong, "123")
    runs = [folder / "one", *(tmp_path / name for name in names)] if wrong == "whole" else [tmp_path / n for n in names]
    more = ["--votes", 3] if wrong == "other flags" else []
    done = run_script("01_curate_preferences.py", *flags, *more, "--run", tmp_path / "run", "--merge", *runs)
    told = {"other flags": "votes=1", "unfinished": "not finished", "same id": "both hold"}.get(wrong, "--merge needs")
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run/preferences.jsonl").exists()


def test_several_policies_and_temperatures(run: Path, tmp_path: Path) -> None:
    """The base and the SFT adapter of the small run, at two temperatures: every candidate says where it is from."""
    flags = ["--offline", "--queries", run.parent / "heldout.jsonl", "--samples", 1, "--temperature", 0.5, 1.0]
    done = run_script(
        "01_curate_preferences.py", *flags, "--policies", run / "policy_sft", "--votes", 3, "--run", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run/candidates.jsonl")
    count = len(lines(run.parent / "heldout.jsonl"))
    assert sorted(Counter((r["source"] == "policy_sft", r["temperature"]) for r in rows).items()) == [
        ((False, 0.5), count), ((False, 1.0), count), ((True, 0.5), count), ((True, 1.0), count),
    ]  # fmt: skip
    fates = Counter(row["fate"] for row in lines(tmp_path / "run/fates.jsonl"))
    assert fates.total() == 4 * count == json.loads((tmp_path / "run/01_summary.json").read_text())["candidates"]
