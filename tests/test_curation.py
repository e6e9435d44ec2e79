"""Step 1's own decisions: what is screened out, what is retrieved, which pairs and demonstrations are chosen."""

import importlib
import json
import random
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, lines, run_script

from common import run_folder
from common.debate import Retrieval
from common.offline.tiny_model import tiny_policy
from common.policy import load_embedding, load_policy, lora
from common.records import Appender, Candidate, Query, Reference, write
from common.texts import screen

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
    pairs, possible = curation.choose_pairs(rows, uses=2)
    leads = [curation.length_lead(pair) for pair in pairs]
    longer, shorter = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    assert len(pairs) > 300 and longer == shorter > 50
    assert curation.longer_wins(pairs)["value"] == 0.5 and curation.longer_wins(possible)["value"] > 0.7
    assert all((a.label, b.label) == (1, 0) and a.query == b.query for a, b in pairs)
    assert max(Counter(one.id for pair in pairs for one in pair).values()) <= 2
    anyhow = [(a, b) for a in rows for b in rows if a.query == b.query and a.label > b.label]
    assert sorted(possible) == sorted(anyhow)
    near = [sum(curation.length_gap(pair) <= 0.2 for pair in some) / len(some) for some in (pairs, anyhow)]
    assert near[0] > near[1]


def test_where_only_longer_texts_win_there_are_no_pairs() -> None:
    rows = [judged(n, n // 2, 40 if n % 2 else 20, n % 2) for n in range(40)]
    pairs, possible = curation.choose_pairs(rows, uses=2)
    assert not pairs and len(possible) == 20
    rows.append(judged(100, 100, 20, 1))
    fates = curation.fates_of(rows, pairs, possible, rows[:1])
    assert fates["0"] == "sft" and fates["2"] == "rejected: left out for the balance of lengths or --uses"
    assert fates["100"] == "accepted: no opposite for its query" and list(fates) == [row.id for row in rows]


def test_no_opening_begins_more_than_its_share_of_the_demonstrations() -> None:
    rows = [judged(n, n // 2, 20, 1, "亲爱" if n % 2 else f"{n:02d}"[-2:]) for n in range(200)]
    chosen = curation.choose_demonstrations(rows)
    assert len(chosen) == 100 == len({row.query for row in chosen})
    assert Counter(row.response[:2] for row in chosen)["亲爱"] <= 6
    free = [judged(n, n // 2, 20, 1, f"{n:03d}"[-2:]) for n in range(60)]
    best = {row.query: row.strengths for row in curation.choose_demonstrations(free)}
    assert all(best[row.query] >= row.strengths for row in free)


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    return [Reference.model_validate(row) for row in lines(ROOT / "data/references.jsonl")]


def test_screening_says_why(references: list[Reference]) -> None:
    texts = {
        "first": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭。",
        "same": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭。",
        "near": "灯火可亲，愿你今晚有热汤，也有人等你回家吃饭！",
        "other": "窗外落雪，屋里有茶，你我慢慢说话。",
        "copy": references[0].response,
        "cut": references[1].response[:-2],
    }
    rows = [Candidate(id=name, query="除夕", response=text) for name, text in texts.items()]
    rows.append(Candidate(id="elsewhere", query="中秋", response=texts["first"]))
    copied = "copies a reference"
    dropped = {"same": "duplicate", "near": "near-duplicate", "copy": copied, "cut": copied}
    assert screen(rows, 0.9, references, 0.8) == dropped
    assert screen(rows, 1.0, [], 1.0) == {"same": "duplicate"}


CANDIDATES = [
    {"query": "教师节", "response": "老师，窗台那盆绿萝还在。"},
    {"query": "教师节", "response": "今晚早点收工。"},
]


def take_candidates(monkeypatch: pytest.MonkeyPatch, run: Path, *files: list[dict]) -> list[dict]:
    """candidates.jsonl after step 1 was given files of these rows, and could screen, but not judge them."""
    monkeypatch.setattr(curation.Client, "probe", lambda args, step: None)
    monkeypatch.setattr(curation, "judge_candidates", lambda *args: sys.exit(0))
    flags = ["01", "--offline", "--samples", "0", "--run", str(run / "run"), "--candidates"]
    for number, rows in enumerate(files):
        write(run / f"{number}.jsonl", rows)
        flags.append(str(run / f"{number}.jsonl"))
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as end:
        curation.main(curation.parse_args())
    run_folder._locks.clear()
    return [] if end.value.code else lines(run / "run/candidates.jsonl")


def test_numbered_candidates_are_taken_and_the_same_one_twice_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = CANDIDATES
    taken = take_candidates(monkeypatch, tmp_path, [one | {"id": 1}, other | {"id": 2}], [one | {"id": "1"}])
    assert [row["id"] for row in taken] == ["1", "2"]


def test_a_file_s_labels_are_compared_only_if_they_are_0_or_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = CANDIDATES
    taken = take_candidates(monkeypatch, tmp_path, [one | {"label": "good"}, other | {"label": 0}])
    assert [row.get("given_label") for row in taken] == [None, 0]


@pytest.mark.parametrize("files", [[[0, 1]], [[0], [1]]], ids=["one file", "two files"])
def test_candidates_that_share_an_id_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: list[list[int]]
) -> None:
    """No candidate goes missing because two lines, or two files, number theirs alike; mended, they are taken."""
    rows = [[CANDIDATES[number] | {"id": "1"} for number in numbers] for numbers in files]
    assert take_candidates(monkeypatch, tmp_path, *rows) == []
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/{len(rows) - 1}.jsonl:{len(rows[-1])}: ") and said.count("\n") == 1
    assert f"{tmp_path}/0.jsonl:1 (1)" in said
    rows[-1][-1]["id"] = "2"
    assert [row["id"] for row in take_candidates(monkeypatch, tmp_path, *rows)] == ["1", "2"]


def test_two_checkouts_sample_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model of each checkout is the same model, so its candidates have the same ids, and are seeded alike."""
    monkeypatch.setattr(curation, "Writer", lambda args: Namespace(close=lambda: None))
    monkeypatch.setattr(curation, "find_policy", lambda policy: (policy, None))
    monkeypatch.setattr(
        curation, "write_greetings", lambda args, writer, base, adapter, slots, *rest: ["好"] * len(slots)
    )
    ids = []
    for checkout in ("old", "new"):
        monkeypatch.setattr(run_folder, "ROOT", tmp_path / checkout)
        args = Namespace(temperature=[1.0], samples=2, seed=0)
        with Appender(tmp_path / f"{checkout}.jsonl") as append:
            curation.sample_from(args, str(tmp_path / checkout / "outputs/tiny"), [Query(query="教师节")], append)
        ids.append(append.done)
    assert len(ids[0]) == 2 and ids[0] == ids[1]


def retrieval(references: list[Reference], queries: list[str], **settings) -> Retrieval:
    found = Retrieval(references, **settings)
    found.look_up(queries)
    return found


def test_retrieval_finds_the_occasion_and_never_the_query_itself(references: list[Reference]) -> None:
    some = references[::20]
    retrieve = retrieval(references, [r.query for r in some])
    for reference in some:
        found = retrieve(reference.query, reference.response)
        assert len(found) == 3 and all(r.query != reference.query and r.id != reference.id for r in found)
    occasions = Counter(r.occasion for r in references)
    hits = [a.occasion == r.occasion for r in some if occasions[r.occasion] > 6 for a in retrieve(r.query, "")]
    assert sum(hits) / len(hits) > 0.4  # by chance: about 0.03


def test_the_popular_come_first_among_the_near() -> None:
    rows = [Reference(query="教师节祝福 老师", response=f"老师好{n}", popularity=n) for n in range(10)]
    rows += [Reference(query=f"中秋快乐 {n}", response=f"月圆{n}", popularity=1000) for n in range(60)]
    retrieve = retrieval(rows, ["教师节祝福"])
    assert [r.response for r in retrieve("教师节祝福", "")] == ["老师好9", "老师好8", "老师好7"]
    assert [r.response for r in retrieve("教师节祝福", "老师好9")] == ["老师好8", "老师好7", "老师好6"]
    unpopular = [r.model_copy(update={"popularity": None}) for r in rows]
    found = retrieval(unpopular, ["教师节祝福"])("教师节祝福", "")
    assert [r.response for r in found] == ["老师好0", "老师好1", "老师好2"]
    assert len(retrieval(rows[:2], ["教师节祝福"], k=5)("教师节祝福", "")) == 2  # fewer references than asked for


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory, references: list[Reference]) -> Path:
    """A tiny sentence-embedding model, pooled at its first token as the BGE models are."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("embedding")
    characters = sorted(set("".join(r.query for r in references)))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(characters) + 5, **size)).eval().save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(16, pooling_mode="cls")]
    SentenceTransformer(modules=modules).save(str(folder / "model"))
    return folder / "model"


def test_an_embedding_model_is_pooled_as_its_authors_say(embedding_model: Path, references: list[Reference]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = [r.query for r in references[:20]]
    vectors = torch.tensor(load_embedding(str(embedding_model))(texts))
    batch = AutoTokenizer.from_pretrained(embedding_model)(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(embedding_model).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    normalize = torch.nn.functional.normalize
    assert torch.allclose(vectors, normalize(hidden[:, 0], dim=-1), atol=1e-5)
    assert not torch.allclose(vectors, normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), atol=1e-2)

    some = references[:50]
    nearest = retrieval(some, texts, embedding_model=str(embedding_model)).nearest[texts[0]]
    assert nearest[0] == (0, pytest.approx(1, abs=1e-3)) and len(nearest) == 35


def test_an_embedding_model_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refusal() -> str:
        with pytest.raises(SystemExit) as stopped:
            load_embedding(str(tmp_path / "missing"))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    said = refusal()
    assert said.startswith("error: --embedding-model") and "cannot be loaded" in said and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
    assert "pip install sentence-transformers" in refusal()


def test_several_policies_and_temperatures(tmp_path: Path) -> None:
    """The base and an adapter of it, at two temperatures: every candidate says where it is from."""
    from peft import get_peft_model

    base = str(tiny_policy())
    get_peft_model(load_policy(base, 16)[0], lora(4, "CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    rows = (ROOT / "data/queries_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "queries.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    flags = ["--offline", "--queries", tmp_path / "queries.jsonl", "--samples", 1, "--temperature", 0.5, 1.0]
    flags += ["--policies", tmp_path / "adapter", "--run", tmp_path / "run"]
    done = run_script("01_curate_preferences.py", *flags)
    assert done.returncode == 0, done.stderr
    sources = Counter((r["source"], r["temperature"]) for r in lines(tmp_path / "run/candidates.jsonl"))
    names = [Path(base).name, "adapter"]
    assert sources == {(name, temperature): 8 for name in names for temperature in (0.5, 1.0)}
    fates = Counter(row["fate"] for row in lines(tmp_path / "run/fates.jsonl"))
    assert fates.total() == 32 == json.loads((tmp_path / "run/01_summary.json").read_text())["candidates"]
