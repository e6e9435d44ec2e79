"""Step 2: train a reward model that cannot be bought with length, repetition or flattery, and measure that.

A Bradley-Terry reward model: the policy's base in 4-bit, a LoRA adapter and a scalar head, trained with TRL so that the
chosen text scores above the rejected one. A plain one, on pairs in which the longer text wins, loves a greeting pasted
twice and a word to the reviewer. So for each pair some more are made whose rejected text is a spoilt form of the chosen
one (SPOILERS), and what is left of the score's correlation with length among good texts is taken off
(calibration.json).
What the model gets right is shown on all pairs, on those of nearly equal length, and under attacks in wordings that
training never saw (ATTACKS), beside two null baselines each time: "the longer text wins", and character n-grams.

Reads   preferences.jsonl of step 1 (--preferences; --eval-preferences instead of a split by query)
Writes  rm/ (adapter, head, calibration.json, training.svg, README.md), rm_eval.jsonl, 02_summary.json
Paper   arXiv 2508.21476: LoRA r 16, learning rate 2e-4, 5 epochs, batch 16 with 8 accumulation steps. Departures: 4-bit
        base; the data gate, the spoilt texts, the calibration, the attacks. Length: post-hoc reward calibration, Huang
        et al. 2024 (arXiv 2409.17407), here with a straight line fitted to chosen texts alone.
Example python 02_train_rm.py --offline --run outputs/mine
        python 02_train_rm.py --offline --run outputs/mine --score greetings.jsonl > scored.jsonl
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.endpoint import add_endpoint_flags
from common.memory import peak_gib
from common.policy import add_policy_flags, load_base, load_tokenizer, lora, policy_path, quiet
from common.records import Candidate, Preference, read, stream, write
from common.rewards import RewardModel, calibrate
from common.run_folder import (
    Stage,
    add_run_flags,
    digest,
    fail,
    file_hash,
    launch,
    main_process,
    open_run,
    parse,
    positive,
    read_summary,
    replace_file,
    write_summary,
)
from common.spoilt import ATTACKS, HARDER, SPOILERS, Others
from common.stats import NgramClassifier, rate
from common.texts import leaks
from common.trainers import draw_curves, per_process, prepare, progress_callback, trainer_settings

OFFLINE = {
    "bits": 16, "epochs": 1, "learning_rate": 7e-4, "batch_size": 16, "accumulation": 1, "max_length": 256,
    "checks": 4, "derived": 4,
}  # fmt: skip


# ---- spoilt texts: made for training, and in other wordings for the stress suite ------------------------------------
# Each takes (chosen text, random numbers, a text for somebody or something else) and returns a worse one; "" for none.


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preferences", type=Path, help="pairs to train on (RUN/preferences.jsonl)")
    add("--eval-preferences", type=Path, help="pairs to test on, instead of a split of --preferences by query")
    add("--eval-share", type=float, default=0.2, help="share of the queries kept for the test (%(default)s)")
    add("--allow-leak", action="store_true", help="train although texts of --eval-preferences are among the pairs")
    add("--score", type=Path, metavar="FILE", help="train nothing: print FILE with a score added to each row")
    add("--derived", type=int, default=3, help="at most so many pairs with a spoilt text for each pair (%(default)s)")
    add("--without", nargs="+", choices=sorted(SPOILERS), default=[], help="kinds of spoilt texts to leave out")
    add("--length-tolerance", type=float, default=0.0, help="correlation of score and length among chosen texts that "
        "calibration leaves; 1: all of it (%(default)s)")  # fmt: skip
    add("--stress-size", type=positive, default=500, help="test texts that are attacked, at most (%(default)s)")
    add("--rank", type=positive, default=16, help="LoRA rank (%(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="%(default)s")
    add("--epochs", type=float, default=5, help="times over the pairs, each time with other spoilt texts (%(default)s)")
    add("--batch-size", type=positive, default=16, help="pairs a device and step (%(default)s)")
    add("--accumulation", type=positive, default=8, help="steps that make one update (%(default)s)")
    add("--max-length", type=positive, default=768, help="tokens; longer pairs are left out (%(default)s)")
    add("--random-batches", action="store_true", help="batches of any lengths, as TRL makes them by default")
    add("--checks", type=positive, default=20, help="times to save and to look at held-out loss (%(default)s)")
    add("--patience", type=positive, default=3, help="checks without a gain, after which to stop (%(default)s)")
    add_policy_flags(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    args.preferences = args.preferences or args.run / "preferences.jsonl"
    return args


# ---- the data gate --------------------------------------------------------------------------------------------------


def side(args: argparse.Namespace, pair: Preference, name: str, share: float) -> bool:
    """Whether a pair's query falls into a share of all queries; the same for every order of the file."""
    return int(digest(args.seed, name, pair.texts[0]), 16) % 10_000 < 10_000 * share


class Split(NamedTuple):
    """The pairs of --preferences and --eval-preferences; a query is on one side only."""

    train: list[Preference]
    stop: list[Preference]  # held out, to stop by
    test: list[Preference]
    leaks: dict[str, int]  # what was found to leak
    leaking: set[str]  # ids of test pairs that leak


def split(args: argparse.Namespace) -> Split:
    """Of a split made here, the training pairs that share a text with the test are left out. Test pairs that the user
    names are not touched: leaks stop the run, or mark its summary.
    """
    pairs, leaking = read(args.preferences, Preference, f"python 01_curate_preferences.py --run {args.run}"), set()
    if args.eval_preferences:
        test = read(args.eval_preferences, Preference)
        leaked = leaks(pairs, test)
        leaking = {p.id for some in leaked.values() for p in some}
        found = {name: len(some) for name, some in leaked.items()}
        if leaking:
            print(f"02: {len(leaking)} of {len(test)} test pairs leak into training, such as", file=sys.stderr)
            for name, some in leaked.items():
                for p in some[:3]:
                    print(f"  {name:9}  {p.id}  {' / '.join(text[:20] for text in p.texts)}", file=sys.stderr)
        if leaking and not args.allow_leak:
            table = ", ".join(f"{count} by {name}" for name, count in found.items())
            fail(f"of {len(test)} test pairs of {args.eval_preferences}, these are among the training pairs: {table}; "
                 "remove them, or go on with --allow-leak")  # fmt: skip
    else:
        test = [p for p in pairs if side(args, p, "test", args.eval_share)]
        pairs = [p for p in pairs if not side(args, p, "test", args.eval_share)]
        shared = {p.id for some in leaks(test, pairs).values() for p in some} if pairs and test else set()
        pairs, found = [p for p in pairs if p.id not in shared], {"training_pairs_left_out": len(shared)}
        if shared:
            print(f"02: {len(shared)} training pairs share a text, or nearly one, with test pairs and are left out")
    stop = [p for p in pairs if side(args, p, "stop", 0.1)]
    train = [p for p in pairs if not side(args, p, "stop", 0.1)]
    if not (train and stop and test):
        fail(f"{args.preferences} has too few queries to split: {len(train)} pairs to train on, {len(stop)} to stop "
             f"by, {len(test)} to test on; add pairs")  # fmt: skip
    return Split(train, stop, test, found, leaking)


def derived_pairs(args: argparse.Namespace, pairs: list[Preference], n: int = 0) -> list[Preference]:
    """At most --derived more pairs for each pair: its chosen text against a spoilt form of it; others for other n."""
    rng, others, more = random.Random(digest(args.seed, n)), Others(pairs), []
    kinds = [name for name in SPOILERS if name not in args.without]
    for pair in pairs if kinds else []:
        for kind in rng.choices(kinds, [HARDER.get(name, 1) for name in kinds], k=args.derived):
            spoilt = SPOILERS[kind](pair.texts[1], rng, others(kind, pair, rng)).strip()
            if spoilt and spoilt != pair.texts[1]:
                rejected = [{"role": "assistant", "content": spoilt}]
                more.append(
                    Preference(prompt=pair.prompt, chosen=pair.chosen, rejected=rejected, why=f"derived: {kind}")
                )
    return more


# ---- the tests, and what needs no understanding to pass them -------------------------------------------------------


def challenges(args: argparse.Namespace, parts: Split) -> dict[str, list[tuple[int, str]]]:
    """For each test the texts that chosen ones must beat, each with the place of its pair among the test pairs: the
    rejected texts, by difference of length, and up to --stress-size texts of each attack."""
    test, rng, others = parts.test, random.Random(args.seed), Others(parts.test)
    rejected = [(i, p.texts[2], len(p.texts[1]) - len(p.texts[2])) for i, p in enumerate(test)]
    found = {
        "all": [(i, text) for i, text, _ in rejected],
        "within_5": [(i, text) for i, text, gap in rejected if abs(gap) <= 5],
        "within_10": [(i, text) for i, text, gap in rejected if abs(gap) <= 10],
        "shorter_chosen": [(i, text) for i, text, gap in rejected if gap < 0],
    }
    if parts.leaking:
        found["without_leaks"] = [(i, text) for i, text, _ in rejected if test[i].id not in parts.leaking]
    some = rng.sample(range(len(test)), min(len(test), args.stress_size))
    for name, attack in ATTACKS.items():
        attacked = ((i, attack(test[i].texts[1], rng, others(name, test[i], rng)).strip()) for i in some)
        found[f"attack: {name}"] = [(i, text) for i, text in attacked if text and text != test[i].texts[1]]
    return found


def right(score: Callable, test: list[Preference], against: dict) -> tuple[dict[str, dict], dict]:
    """({test: rate at which the chosen text scores higher}, {(place of a pair, text): score}); `score` takes a list of
    such places and texts."""
    chosen = [(i, p.texts[1]) for i, p in enumerate(test)]
    asked = list(dict.fromkeys(chosen + [text for texts in against.values() for text in texts]))
    scores = dict(zip(asked, score(asked), strict=True))
    rates = {
        name: rate(sum(scores[chosen[i]] > scores[i, text] for i, text in texts), len(texts))
        for name, texts in against.items()
    }
    return rates, scores


def null_baselines(args: argparse.Namespace, parts: Split, against: dict) -> dict[str, dict]:
    """{rule: {test: rate}} of two rules that understand nothing."""
    labels = [label for _ in parts.train for label in (1, 0)]
    ngrams = NgramClassifier([t for p in parts.train for t in p.texts[1:]], labels, args.seed)
    rules = {
        "longer": lambda asked: [len(text) for _, text in asked],
        "ngram": lambda asked: ngrams([text for _, text in asked]),
    }
    return {name: right(rule, parts.test, against)[0] for name, rule in rules.items()}


# ---- training -------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, pairs: list[Preference], epochs: float, stop: list[Preference], base: str
) -> list[dict]:
    """Train and save rm/, from the last checkpoint if there is one; returns the trainer's log."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import RewardConfig, RewardTrainer

    checkpoints = args.run / "rm_checkpoints"

    class FiniteRewardTrainer(RewardTrainer):
        def compute_loss(self, *inputs, **options):
            loss = super().compute_loss(*inputs, **options)
            if not torch.isfinite(loss[0] if isinstance(loss, tuple) else loss):
                fail(f"the loss is not finite at step {self.state.global_step}; the last good checkpoint is in "
                     f"{checkpoints}: run again with --redo and a lower --learning-rate")  # fmt: skip
            return loss

    def rows(records: list[Preference]) -> Dataset:
        kept = [p.model_dump(include={"prompt", "chosen", "rejected"}) for p in records]
        # Batches of like length waste less on padding; the sampler needs to know the length of a row.
        lengths = [max(map(len, p.texts[1:])) + len(p.texts[0]) for p in records]
        return Dataset.from_list([row | {"length": n} for row, n in zip(kept, lengths, strict=True)])

    steps = math.ceil(len(pairs) / (args.batch_size * args.accumulation)) * epochs
    every = max(1, math.ceil(steps / args.checks))
    tokenizer = load_tokenizer(base)
    # On a CPU the fused attention is slower with short padded rows; scoring keeps it: it spares memory on long ones.
    attention = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    torch.manual_seed(args.seed)  # the head begins at random
    model = load_base(AutoModelForSequenceClassification, base, args.bits, num_labels=1, **attention)
    batch, accumulation = per_process(args.batch_size, args.accumulation)
    config = RewardConfig(
        output_dir=str(checkpoints), num_train_epochs=epochs, learning_rate=args.learning_rate,
        per_device_train_batch_size=batch, per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=accumulation, max_length=args.max_length, seed=args.seed,
        # Trainings are of some hundred steps: the usual 0.999 would average the squared gradients over all of them.
        lr_scheduler_type="cosine", warmup_steps=0.1, adam_beta2=0.98, logging_steps=max(1, every // 4),
        eval_strategy="steps", save_strategy="steps", eval_steps=every, save_steps=every, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", logging_nan_inf_filter=False,
        # Without its own column the sampler finds no length; the collator takes what it needs.
        train_sampling_strategy="random" if args.random_batches else "group_by_length", remove_unused_columns=False,
        pad_to_multiple_of=16,  # every new shape costs a CPU's kernels a compilation
        **trainer_settings(args.bits) | {"bf16": True},
    )  # fmt: skip
    bar = progress_callback("reward model", ["loss", "accuracy", "eval_loss"])
    trainer = FiniteRewardTrainer(
        model=model, args=config, train_dataset=rows(pairs), eval_dataset=rows(stop), processing_class=tokenizer,
        peft_config=lora(args.rank, 2 * args.rank, "SEQ_CLS", modules_to_save=["score"]),
        callbacks=[bar, EarlyStoppingCallback(args.patience)],
    )  # fmt: skip
    prepare(trainer)
    if not len(trainer.train_dataset) or not len(trainer.eval_dataset):
        fail(f"all pairs are longer than --max-length {args.max_length} tokens; raise it")
    if too_long := len(pairs) - len(trainer.train_dataset):
        print(f"02: of {len(pairs)} pairs, spoilt ones included, {too_long} are longer than --max-length "
              f"{args.max_length} and left out")  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    trainer.save_model(str(args.run / "rm"))
    return trainer.state.log_history


# ---- what it has learnt ---------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, rm: RewardModel, test: list[Preference], against: dict) -> dict:
    """Right on the test pairs, by difference of length, and under each attack; also writes rm_eval.jsonl."""
    import numpy as np
    from scipy.stats import spearmanr

    def score(asked: list[tuple[int, str]]) -> list[float]:
        return rm.score_conversations([[*test[i].prompt, {"role": "assistant", "content": text}] for i, text in asked])

    tests, scores = right(score, test, against)
    write(args.run / "rm_eval.jsonl", (
        {"id": p.id, "query": p.texts[0], "chosen": p.texts[1], "rejected": p.texts[2],
         "chosen_score": scores[i, p.texts[1]], "rejected_score": scores[i, p.texts[2]]}
        for i, p in enumerate(test)
    ))  # fmt: skip
    good, lengths = [scores[i, p.texts[1]] for i, p in enumerate(test)], [len(p.texts[1]) for p in test]
    some = len(set(good)) > 1 and len(set(lengths)) > 1  # else there is nothing to correlate
    return {
        "eval": tests,
        "length_correlation": round(float(np.corrcoef(good, lengths)[0, 1]), 4) if some else 0.0,
        # Of the ranks: one very long text decides nothing.
        "length_rank_correlation": round(float(spearmanr(good, lengths)[0]), 4) if some else 0.0,
    }


CARD = """---
library_name: peft
base_model: {base}
---
# Reward model for Chinese greetings

A scalar head and a LoRA adapter on `{base}`, trained by `02_train_rm.py` on {train_pairs} pairs and {derived_pairs}
with spoilt texts. A score is `(head - slope x length - mean) / std`, with the figures of `calibration.json`, the length
in characters of the response, no shorter than `shortest` and no longer than `longest` there.

```python
import json
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

tokenizer = AutoTokenizer.from_pretrained("{base}")
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1, {loading})
model = PeftModel.from_pretrained(base, "rm").eval()
figures = json.load(open("rm/calibration.json"))

def score(prompt, response):  # the prompt as the policy is asked
    chat = [{{"role": "user", "content": prompt}}, {{"role": "assistant", "content": response}}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt").to(model.device)
    with torch.inference_mode():
        head = model(**ids).logits.item()
    length = min(max(len(response), figures["length"]["shortest"]), figures["length"]["longest"])
    return (head - figures["length"]["slope"] * length - figures["mean"]) / figures["std"]
```

| test | right | 95% interval | null: the longer text wins | null: character n-grams | n |
|---|---|---|---|---|---|
{table}

Correlation of score and length within chosen texts: {length_correlation:+.2f} (of their ranks
{length_rank_correlation:+.2f}). Leaks: {found}.

![loss and accuracy](training.svg)
"""
LOADING = {
    16: 'dtype="float32"',
    4: 'dtype="bfloat16", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    'bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["score"])',
}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def score_file(args: argparse.Namespace, base: str) -> None:
    """Print every row of --score as it is, with its score, in order, a batch at a time."""
    rm = RewardModel(args.run / "rm", base, args.bits, args.prompts)
    with open(args.score, encoding="utf-8") as file:
        rows = zip(stream(args.score, Candidate, unique=False), filter(str.strip, file), strict=True)
        while part := list(itertools.islice(rows, args.batch_size_generate)):
            for (_, line), score in zip(part, rm.score([(r.query, r.response) for r, _ in part]), strict=True):
                print(json.dumps(json.loads(line) | {"score": round(score, 6)}, ensure_ascii=False))


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base = policy_path(args)
    if args.score:
        quiet()
        score_file(args, base)
        return 0
    parts = split(args)
    open_run(args.run)
    stage = Stage(
        args.run, "02_rm", ["rm", "rm_eval.jsonl", "rm_checkpoints"],
        {"preferences": file_hash(args.preferences), "seed": args.seed, "base": base, "bits": args.bits,
         "eval": file_hash(args.eval_preferences) if args.eval_preferences else args.eval_share,
         "derived": args.derived, "without": args.without, "rank": args.rank, "learning_rate": args.learning_rate,
         "epochs": args.epochs, "max_length": args.max_length, "batch": args.batch_size * args.accumulation,
         "length_tolerance": args.length_tolerance, "checks": args.checks, "patience": args.patience,
         "random_batches": args.random_batches, "stress_size": args.stress_size},
        args.redo,
    )  # fmt: skip
    if stage.done and read_summary(args.run, "02_summary"):
        print(f"02: done already, see {args.run / '02_summary.json'}")
        return 0
    against = challenges(args, parts)
    nulls = null_baselines(args, parts, against)
    for name, rates in nulls.items():
        r = rates["all"]
        print(f"02: null baseline: {name:6} {percent(r['value'])}  [{r['lo']:.1%}, {r['hi']:.1%}]  n {r['n']}")
    quiet()
    # At each time over the pairs they meet other spoilt forms, beside which they count twice: what tells their texts
    # apart is finer.
    rounds = max(1, math.ceil(args.epochs))
    derived = [pair for n in range(rounds) for pair in derived_pairs(args, parts.train, n)]
    shown = parts.train * rounds * (2 if derived else 1) + derived
    log = train(args, shown, args.epochs / rounds, parts.stop + derived_pairs(args, parts.stop), base)
    if not main_process():
        return 0
    peak = peak_gib()
    figures = {"train_pairs": len(parts.train), "derived_pairs": len(derived), "test_pairs": len(parts.test)}
    figures |= evaluate(args, calibrate(args, parts.stop, base), parts.test, against)
    for test_name, r in figures["eval"].items():
        r["null"] = {name: rates[test_name] for name, rates in nulls.items()}
    figures |= {"leaks": parts.leaks, "leaked": bool(parts.leaking)}
    figures |= {"baselines": {name: rates["all"] for name, rates in nulls.items()}, "log": log, "peak_gib": peak}
    table = "\n".join(
        f"| {name} | {percent(r['value'])} | {percent(r['lo'])} to {percent(r['hi'])} | "
        f"{percent(r['null']['longer']['value'])} | {percent(r['null']['ngram']['value'])} | {r['n']} |"
        for name, r in figures["eval"].items()
    )
    draw_curves(args.run / "rm" / "training.svg", {
        name: {
            label: [(entry["step"], entry[key]) for entry in log if key in entry]
            for key, label in ((name, "training"), (f"eval_{name}", "held out"))
        }
        for name in ("loss", "accuracy")
    })  # fmt: skip
    said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in parts.leaks.items())
    card = CARD.format(base=base, table=table, loading=LOADING[args.bits], found=said, **figures)
    replace_file(args.run / "rm" / "README.md", card)
    write_summary(args.run, "02_summary", started, vars(args), figures)
    stage.finish()
    for name, r in figures["eval"].items():
        longer, ngram = (percent(r["null"][rule]["value"]) for rule in ("longer", "ngram"))
        print(f"02: {name:28} {percent(r['value']):>6}  [{percent(r['lo'])}, {percent(r['hi'])}]  "
              f"longer {longer}, n-grams {ngram}, n {r['n']}")  # fmt: skip
    print(f"02: correlation of score and length within chosen texts {figures['length_correlation']:+.2f}; "
          f"reward model in {args.run / 'rm'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
