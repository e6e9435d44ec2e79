"""Turn a clone of the authors' repository into this project's records, and audit what is in them.

The authors' data (arXiv 2508.21476) carry no licence, so they are not shipped here. With a clone of their repository
beside this one:

    python data/import_paper.py ../Igniting-Creative-Writing-in-Small-Language-Models --out data/paper

writes preferences.train.jsonl, preferences.test.jsonl, sft.jsonl, queries.jsonl, queries_heldout.jsonl,
queries_all.jsonl, labelled.jsonl and audit.json: how far text length and character n-grams alone decide the labels,
duplicates, and the rows of one set that occur in another. --clean drops every labelled row whose text is in a training
set.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.prompts import PROMPTS, conversation
from common.records import Candidate, Demonstration, Labelled, Preference, Query, two_sided, write
from common.run_folder import fail, read_text, replace_file
from common.stats import length_rule, ngram_classifier, rate

REPOSITORY = "https://github.com/weixiaolong94-hub/Igniting-Creative-Writing-in-Small-Language-Models"
FOLDS = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"clone of {REPOSITORY}")
    parser.add_argument("--out", type=Path, default=Path("data/paper"), help="folder to write to (%(default)s)")
    parser.add_argument("--clean", action="store_true", help="drop labelled rows whose text is in a training set")
    return parser.parse_args()


def require(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        fail(f"{path} does not exist; clone the authors' repository: git clone {REPOSITORY}")
    return path


def read_json(folder: Path, name: str) -> list[dict]:
    """A list of objects, written either as one JSON array or one object a line."""
    path = require(folder, name)
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
    except json.JSONDecodeError as e:
        fail(f"{path}:{e.lineno}: not JSON; clone the authors' repository again: git clone {REPOSITORY}")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError:
            fail(f"{path}:{number}: not JSON; clone the authors' repository again: git clone {REPOSITORY}")
    return rows


@dataclass
class Release:
    """What the clone holds. A triple is (query, chosen text, rejected text)."""

    triples: dict[str, list[tuple[str, str, str]]]  # "train", "test"
    queries: dict[str, list[str]]  # "train", "test", "all"
    demonstrations: list[tuple[str, str]]  # (query, text) of supervised fine-tuning
    labelled: list[Labelled]


def read_release(folder: Path) -> Release:
    triples, queries = {}, {}
    for side in ("train", "test"):
        triples[side] = []
        for row in read_json(folder, f"reward_model/reward_data_{side}.json"):
            query = row["conversations"][0]["value"]
            triples[side].append((query, row["chosen"]["value"], row["rejected"]["value"]))
        queries[side] = grpo_queries(folder, f"{side}.parquet")
    queries["all"] = read_text(require(folder, "random_query.txt")).split("\n")
    demonstrations = [(row["instruction"], row["output"]) for row in read_json(folder, "sft/sft_data.json")]
    labelled = [Labelled(**row) for row in read_json(folder, "evaluation_set/evaluate_data.json")]
    return Release(triples, queries, demonstrations, labelled)


def grpo_queries(folder: Path, name: str) -> list[str]:
    """The queries of a parquet file of RL prompts, without the sentence before each."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(require(folder, f"grpo_data/{name}"), columns=["prompt"])
    prompts = table.to_pydict()["prompt"]
    return [prompt[0]["content"].removeprefix("请只生成一条祝福语：") for prompt in prompts]


# ---- the audit ------------------------------------------------------------------------------------------------------


def share(flags: Iterable[bool]) -> dict:
    """The rate of true ones among these flags, with its interval and n."""
    flags = list(flags)
    return rate(sum(flags), len(flags))


def length_accuracy(labelled: list[Labelled]) -> tuple[int, dict]:
    """The number of characters at or above which "good" is most often right, and how often it is."""
    least = length_rule([row.response for row in labelled], [row.label for row in labelled])
    return least, share((len(row.response) >= least) == row.label for row in labelled)


def ngram_accuracy(labelled: list[Labelled]) -> dict:
    """How often a classifier on character n-grams is right on rows that it was not trained on (5 folds)."""
    right = 0
    for fold in range(FOLDS):
        seen = [row for number, row in enumerate(labelled) if number % FOLDS != fold]
        unseen = labelled[fold::FOLDS]
        classifier = ngram_classifier([row.response for row in seen], [row.label for row in seen])
        verdicts = classifier.predict([row.response for row in unseen]).tolist()
        right += sum(verdict == row.label for verdict, row in zip(verdicts, unseen, strict=True))
    return rate(right, len(labelled))


def audit(release: Release) -> dict[str, dict]:
    """What a model could learn from the release without understanding a greeting, and what it could remember."""
    train, test = release.triples["train"], release.triples["test"]
    labelled, demonstrations = release.labelled, release.demonstrations
    train_queries = {query for query, _, _ in train}
    chosen_rows = {(query, chosen) for query, chosen, _ in train}
    chosen_texts = {chosen for _, chosen, _ in train + test}
    sft_rows, sft_texts = set(demonstrations), {text for _, text in demonstrations}
    (opening, times), *_ = Counter(text[:2] for _, text in demonstrations).most_common(1)
    least, by_length = length_accuracy(labelled)
    good = [row for row in labelled if row.label]
    return {
        "longer wins, training pairs": share(len(chosen) > len(rejected) for _, chosen, rejected in train),
        "longer wins, test pairs": share(len(chosen) > len(rejected) for _, chosen, rejected in test),
        f"labelled rows: at least {least} characters is good": by_length,
        "labelled rows: character n-grams, 5 folds": ngram_accuracy(labelled),
        "labelled rows that are (query, chosen) of the training pairs": share(
            (row.query, row.response) in chosen_rows for row in labelled
        ),
        "positive labelled rows that are (query, chosen) of the training pairs": share(
            (row.query, row.response) in chosen_rows for row in good
        ),
        "labelled rows whose (query, text) is an SFT row": share(
            (row.query, row.response) in sft_rows for row in labelled
        ),
        "labelled rows whose text is an SFT output": share(row.response in sft_texts for row in labelled),
        "SFT outputs that are chosen texts": share(text in chosen_texts for _, text in demonstrations),
        f"SFT outputs that open with {opening}": rate(times, len(demonstrations)),
        "labelled rows repeated": rate(len(labelled) - len(distinct(labelled)), len(labelled)),
        "pairs left out: the same text on both sides, or none on one": share(
            not two_sided(chosen, rejected) for _, chosen, rejected in train + test
        ),
        "test pairs whose query is in the training pairs": share(query in train_queries for query, _, _ in test),
    }


def clean(release: Release) -> list[Labelled]:
    """The labelled rows whose text is in no training set."""
    texts = {text for _, text in release.demonstrations}
    for triples in release.triples.values():
        for _, chosen, rejected in triples:
            texts.update((chosen, rejected))
    return [row for row in release.labelled if row.response not in texts]


# ---- the records ----------------------------------------------------------------------------------------------------


def distinct(records: Iterable) -> list:
    """The records without exact repetitions, which would share an id."""
    return list({record.id: record for record in records}.values())


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def preferences(triples: list[tuple[str, str, str]]) -> list[Preference]:
    rows = []
    for query, chosen, rejected in triples:
        if two_sided(chosen, rejected):
            sides = {"chosen": answer(chosen), "rejected": answer(rejected)}
            rows.append(Preference(prompt=conversation(query, PROMPTS), query=query, why="as released", **sides))
    return rows


def candidates(triples: list[tuple[str, str, str]]) -> list[Candidate]:
    """Both texts of every pair, for step 1 to judge again."""
    rows = []
    for query, chosen, rejected in triples:
        for text, label in ((chosen, 1), (rejected, 0)):
            if text.strip():
                rows.append(Candidate(query=query, response=text, source="the paper's pairs", given_label=label))
    return rows


def demonstrations(pairs: list[tuple[str, str]]) -> list[Demonstration]:
    rows = []
    for query, text in pairs:
        rows.append(Demonstration(prompt=conversation(query, PROMPTS), query=query, completion=answer(text)))
    return rows


def main(args: argparse.Namespace) -> int:
    marks = sorted(args.clone.rglob("reward_model/reward_data_train.json"))
    if not marks:
        fail(f"{args.clone} holds no reward_model/reward_data_train.json; clone: git clone {REPOSITORY}")
    release = read_release(marks[0].parent.parent)
    shares = audit(release)
    labelled = release.labelled
    if args.clean:
        labelled = clean(release)
        shares["labelled rows left after --clean, positive"] = share(row.label == 1 for row in labelled)

    train, test = release.triples["train"], release.triples["test"]
    files = {
        "preferences.train.jsonl": preferences(train),
        "preferences.test.jsonl": preferences(test),
        "candidates.jsonl": candidates(train + test),
        "sft.jsonl": demonstrations(release.demonstrations),
        "queries.jsonl": [Query(query=query) for query in release.queries["train"] if query.strip()],
        "queries_heldout.jsonl": [Query(query=query) for query in release.queries["test"] if query.strip()],
        "queries_all.jsonl": [Query(query=query) for query in release.queries["all"] if query.strip()],
        "labelled.jsonl": labelled,
    }
    for name, rows in files.items():
        rows = distinct(rows)
        write(args.out / name, rows)
        print(f"{len(rows):6}  {args.out / name}")
    replace_file(args.out / "audit.json", json.dumps(shares, ensure_ascii=False, indent=1) + "\n")
    print()
    for name, r in shares.items():
        if r["n"]:
            print(f"{r['value']:7.1%}  [{r['lo']:.1%}, {r['hi']:.1%}]  of {r['n']:5}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
