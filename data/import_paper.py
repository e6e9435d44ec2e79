"""Turn a clone of the authors' repository into this project's records, and audit what is in them.

The authors' data (arXiv 2508.21476) carry no licence, so they are not shipped here. With a clone of their repository
beside this one:

    python data/import_paper.py ../Igniting-Creative-Writing-in-Small-Language-Models --out data/paper

writes preferences.train.jsonl, preferences.test.jsonl, sft.jsonl, queries.jsonl, queries_heldout.jsonl,
queries_all.jsonl, labelled.jsonl and audit.json: how far text length and character n-grams alone decide the labels,
duplicates, and the rows of one set that stand in another. --clean drops every labelled row whose text is in a training
set.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jsonlines

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.prompts import PROMPTS, conversation
from common.records import Candidate, Demonstration, Labelled, Preference, Query, two_sided, write
from common.run_folder import fail, replace_file
from common.stats import NgramClassifier, length_rule, rate

REPOSITORY = "https://github.com/weixiaolong94-hub/Igniting-Creative-Writing-in-Small-Language-Models"
FOLDS = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"clone of {REPOSITORY}")
    parser.add_argument("--out", type=Path, default=Path("data/paper"), help="folder to write to (%(default)s)")
    parser.add_argument("--clean", action="store_true", help="drop labelled rows whose text is in a training set")
    return parser.parse_args()


def present(folder: Path, name: str) -> Path:
    path = folder / name
    return (
        path
        if path.is_file()
        else fail(f"{path} does not exist; clone the authors' repository: git clone {REPOSITORY}")
    )


def read_json(folder: Path, name: str) -> list[dict]:
    """A list of objects, written either as one JSON array or one object a line."""
    path = present(folder, name)
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return list(jsonlines.Reader(text.splitlines()).iter(type=dict, skip_empty=True))
    except (json.JSONDecodeError, jsonlines.InvalidLineError) as e:
        fail(f"{path}:{e.lineno}: not JSON; clone the authors' repository again: git clone {REPOSITORY}")


def grpo_queries(folder: Path, name: str) -> list[str]:
    """The queries of a parquet file of RL prompts, without the sentence that stands before each."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(present(folder, f"grpo_data/{name}"), columns=["prompt"])
    prompts = table.to_pydict()["prompt"]
    return [prompt[0]["content"].removeprefix("请只生成一条祝福语：") for prompt in prompts]


def distinct(records: Iterable) -> list:
    """The records without exact repetitions, which would share an id."""
    return list({record.id: record for record in records}.values())


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def best_length_rule(labelled: list[Labelled]) -> tuple[int, dict]:
    """The number of characters from which "good" is most often right, and how often it is."""

    least = length_rule([r.response for r in labelled], [r.label for r in labelled])
    return least, rate(sum((len(r.response) >= least) == r.label for r in labelled), len(labelled))


def ngrams_right(labelled: list[Labelled]) -> dict:
    """How often a classifier on character n-grams is right on rows that it was not trained on (5 folds)."""
    right = 0
    for fold in range(FOLDS):
        seen = [r for i, r in enumerate(labelled) if i % FOLDS != fold]
        model = NgramClassifier([r.response for r in seen], [r.label for r in seen])
        unseen = labelled[fold::FOLDS]
        right += sum((odds > 0) == r.label for odds, r in zip(model([r.response for r in unseen]), unseen, strict=True))
    return rate(right, len(labelled))


def main(args: argparse.Namespace) -> int:
    found = sorted(args.clone.rglob("reward_model/reward_data_train.json"))
    if not found:
        fail(f"{args.clone} holds no reward_model/reward_data_train.json; clone: git clone {REPOSITORY}")
    folder = found[0].parent.parent

    triples = {
        side: [(r["conversations"][0]["value"], r["chosen"]["value"], r["rejected"]["value"]) for r in rows]
        for side, rows in ((s, read_json(folder, f"reward_model/reward_data_{s}.json")) for s in ("train", "test"))
    }
    demonstrations = [(r["instruction"], r["output"]) for r in read_json(folder, "sft/sft_data.json")]
    labelled = [Labelled(**r) for r in read_json(folder, "evaluation_set/evaluate_data.json")]
    queries = {side: grpo_queries(folder, f"{side}.parquet") for side in ("train", "test")}
    every = present(folder, "random_query.txt").read_text(encoding="utf-8").splitlines()

    chosen = {(q, c) for q, c, _ in triples["train"]}
    chosen_texts = {c for side in triples.values() for _, c, _ in side}
    training_texts = {t for side in triples.values() for _, c, r in side for t in (c, r)} | {
        o for _, o in demonstrations
    }
    positives = [r for r in labelled if r.label]
    least, by_length = best_length_rule(labelled)
    sft_rows, sft_outputs = set(demonstrations), {output for _, output in demonstrations}
    openings = Counter(output[:2] for _, output in demonstrations)
    train, test = triples["train"], triples["test"]
    train_queries = {q for q, _, _ in train}
    audit = {
        "longer wins, training pairs": rate(sum(len(c) > len(r) for _, c, r in train), len(train)),
        "longer wins, test pairs": rate(sum(len(c) > len(r) for _, c, r in test), len(test)),
        f"labelled rows: at least {least} characters is good": by_length,
        "labelled rows: character n-grams, 5 folds": ngrams_right(labelled),
        "labelled rows that are (query, chosen) of the training pairs": rate(
            sum((r.query, r.response) in chosen for r in labelled), len(labelled)),
        "positive labelled rows that are (query, chosen) of the training pairs": rate(
            sum((r.query, r.response) in chosen for r in positives), len(positives)),
        "labelled rows whose (query, text) is an SFT row": rate(
            sum((r.query, r.response) in sft_rows for r in labelled), len(labelled)),
        "labelled rows whose text is an SFT output": rate(
            sum(r.response in sft_outputs for r in labelled), len(labelled)),
        "SFT outputs that are chosen texts": rate(
            sum(o in chosen_texts for _, o in demonstrations), len(demonstrations)),
        f"SFT outputs that open with {openings.most_common(1)[0][0]}": rate(
            openings.most_common(1)[0][1], len(demonstrations)),
        "labelled rows repeated": rate(len(labelled) - len(distinct(labelled)), len(labelled)),
        "pairs left out: the same text on both sides, or none on one": rate(
            sum(not two_sided(c, r) for _, c, r in train + test), len(train) + len(test)),
        "test pairs whose query is in the training pairs": rate(
            sum(q in train_queries for q, _, _ in test), len(test)),
    }  # fmt: skip
    if args.clean:
        labelled = [r for r in labelled if r.response not in training_texts]
        audit["labelled rows left after --clean, positive"] = rate(sum(r.label for r in labelled), len(labelled))

    def preferences(side: str) -> list[Preference]:
        return distinct(
            Preference(
                prompt=conversation(q, PROMPTS), query=q, chosen=answer(c), rejected=answer(r), why="as released"
            )
            for q, c, r in triples[side]
            if two_sided(c, r)
        )

    files = {
        "preferences.train.jsonl": preferences("train"),
        "preferences.test.jsonl": preferences("test"),
        "candidates.jsonl": distinct(  # both texts of every pair, for step 1 to judge again
            Candidate(query=q, response=t, source="the paper's pairs", given_label=label)
            for side in triples.values() for q, c, r in side for t, label in ((c, 1), (r, 0)) if t.strip()
        ),
        "sft.jsonl": distinct(Demonstration(prompt=conversation(q, PROMPTS), query=q, completion=answer(o))
                              for q, o in demonstrations),
        "queries.jsonl": distinct(Query(query=q) for q in queries["train"] if q.strip()),
        "queries_heldout.jsonl": distinct(Query(query=q) for q in queries["test"] if q.strip()),
        "queries_all.jsonl": distinct(Query(query=q) for q in every if q.strip()),
        "labelled.jsonl": distinct(labelled),
    }  # fmt: skip
    for name, records in files.items():
        write(args.out / name, records)
        print(f"{len(records):6}  {args.out / name}")
    replace_file(args.out / "audit.json", json.dumps(audit, ensure_ascii=False, indent=1) + "\n")
    print()
    for name, r in audit.items():
        if r["n"]:
            print(f"{r['value']:7.1%}  [{r['lo']:.1%}, {r['hi']:.1%}]  of {r['n']:5}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
