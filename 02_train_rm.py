"""Step 2: train a reward model that is hard to game by length, repetition or flattery, and measure how hard.

A Bradley-Terry reward model: the policy's base in 4 bits, a LoRA adapter and a scalar head, trained with TRL so that
the chosen text scores above the rejected one. A plain one, on pairs in which the longer text wins, loves a greeting
pasted twice and a word to the reviewer. So

    pairs        are split by query; training pairs that share a text with a test pair are left out
    spoilt pairs are added: a chosen text against a spoilt form of itself, different ones each epoch  common/spoilt.py
    training     stops when the loss on held-out pairs no longer falls                                TRL
    calibration  subtracts what remains of the score's correlation with length among good texts      reward_model.py
    --hard       goes on from the finished rm/ with rollouts of a policy that found what it overrates   common/hard.py
    tests        on all pairs, on pairs of nearly equal length, and under attacks in wordings that training never saw;
                 beside each result, how often "the longer text wins" and character n-grams are right

Reads   preferences.jsonl of step 1 (--preferences; --eval-preferences instead of a split by query)
Writes  rm/ (adapter, head, calibration.json, training.svg, README.md), rm_checkpoints/, rm_eval.jsonl, 02_summary.json;
        with --hard also hard_pairs.jsonl, rm_hard_checkpoints/, rm_before_hard/ (what rm/ was)
Paper   arXiv 2508.21476: LoRA r 16, learning rate 2e-4, 5 epochs, batch 16 with 8 accumulation steps. Departures: 4-bit
        base; the split, the spoilt pairs (beside which each pair is shown twice per epoch), the calibration, the
        attacks. Length: post-hoc reward calibration, Huang et al. 2024 (arXiv 2409.17407), here with a straight line
        fitted to chosen texts alone.
Example python 02_train_rm.py --offline --run outputs/mine
        python 02_train_rm.py --offline --run outputs/mine --hard outputs/mine/rollouts_rm.jsonl
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

from common import hard, records, run_folder, stats, trainers
from common.endpoint import add_endpoint_flags
from common.memory import peak_gib
from common.pairs import Split, split_pairs
from common.policy import add_policy_flags, load_base, load_tokenizer, lora, policy_path, silence_libraries
from common.reward_model import RewardModel, compute_in_fp32
from common.search import bought, search_scores, sources_of
from common.spoilt import FAMILIES, Pairs, attacked_texts, derived_pairs
from common.store import open_store

OFFLINE = {"bits": 16, "epochs": 1, "learning_rate": 1e-3, "batch_size": 16, "accumulation": 1, "max_length": 256}
OFFLINE |= {"checks": 4, "derived": 4}
SEARCHED = 120  # chosen texts of the test part, at most, on which the reward model is to be bought


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--preferences", type=Path, help="pairs to train on (RUN/preferences.jsonl)")
    add("--eval-preferences", type=Path, help="pairs to test on, instead of a split of --preferences by query")
    add("--eval-share", type=float, default=0.2, help="share of the queries kept for the test (%(default)s)")
    add("--derived", type=int, default=3, help="spoilt pairs added for each pair, at most (%(default)s)")
    add("--without", nargs="+", choices=FAMILIES, default=[], metavar="FAMILY", help="spoilt texts to leave out")
    add("--stress-size", type=run_folder.positive, default=500, help="test texts attacked, at most (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--rank", type=run_folder.positive, default=16, help="LoRA rank (%(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="%(default)s")
    add("--epochs", type=float, default=5, help="times over the pairs, each with different spoilt texts (%(default)s)")
    add("--batch-size", type=run_folder.positive, default=16, help="pairs per device and step (%(default)s)")
    add("--accumulation", type=run_folder.positive, default=8, help="steps that make one update (%(default)s)")
    add("--max-length", type=run_folder.positive, default=768, help="tokens; longer pairs are left out (%(default)s)")
    add("--checks", type=run_folder.positive, default=20, help="times to save and test on held-out pairs (%(default)s)")
    add("--patience", type=run_folder.positive, default=3, help="checks without a gain that end it (%(default)s)")
    add("--length-tolerance", type=float, default=0.0, help="correlation with length that stays; 1: all (%(default)s)")
    # These change no output, so no stage names them.
    add = parser.add_argument_group("what to do").add_argument
    add("--allow-leak", action="store_true", help="train although texts of --eval-preferences are among the pairs")
    add("--hard", type=Path, nargs="+", metavar="FILE", help="go on from RUN/rm with these rollouts, rewarded by it")
    add("--score", type=Path, metavar="FILE", help="train nothing: print FILE with a score added to each row")
    add_policy_flags(parser)
    add_endpoint_flags(parser)  # but for --hard only --prompts counts; run.sh passes the others to all
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, OFFLINE)
    args.preferences = args.preferences or args.run / "preferences.jsonl"
    return args


# ---- the tests, and what needs no understanding to pass them --------------------------------------------------------

Rival = tuple[int, str]  # the place of a test pair, and a text that is to score below its chosen text
Tests = dict[str, list[Rival]]


def build_tests(args: argparse.Namespace, split: Split) -> Tests:
    """The rivals in each test: rejected texts, by difference of length, and up to --stress-size texts per attack."""
    tests: Tests = {"all": [], "within_5": [], "within_10": [], "shorter_chosen": []}
    if split.leaking:
        tests["without_leaks"] = []
    for place, pair in enumerate(split.test):
        _, chosen, rejected = pair.texts
        gap = len(chosen) - len(rejected)
        belongs = {"all": True, "within_5": abs(gap) <= 5, "within_10": abs(gap) <= 10, "shorter_chosen": gap < 0}
        belongs["without_leaks"] = pair.id not in split.leaking
        for name, rivals in tests.items():
            if belongs[name]:
                rivals.append((place, rejected))
    for name, rivals in attacked_texts(split.test, args.stress_size, args.seed).items():
        tests[f"attack: {name}"] = rivals
    return tests


def accuracy(score: Callable, pairs: Pairs, tests: Tests) -> tuple[dict[str, dict], dict[Rival, float]]:
    """({test: rate at which the chosen text scores above its rival}, the score of each text). A tie is half a win."""
    chosen = [(place, pair.texts[1]) for place, pair in enumerate(pairs)]
    texts = list(dict.fromkeys(itertools.chain(chosen, *tests.values())))  # each once
    scores = dict(zip(texts, score(texts), strict=True))
    rates = {}
    for name, rivals in tests.items():
        gaps = [scores[chosen[place]] - scores[place, text] for place, text in rivals]
        rates[name] = stats.rate(sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps), len(rivals))
    return rates, scores


def null_baselines(args: argparse.Namespace, split: Split, tests: Tests) -> dict[str, dict[str, dict]]:
    """{rule: {test: rate}} of two rules that understand nothing."""
    texts = [text for pair in split.train for text in pair.texts[1:]]  # chosen, rejected, chosen, rejected...
    ngrams = stats.ngram_classifier(texts, [1, 0] * len(split.train), args.seed)
    by_length, _ = accuracy(lambda rivals: [len(text) for _, text in rivals], split.test, tests)
    by_ngrams, _ = accuracy(lambda rivals: ngrams.decision_function([text for _, text in rivals]), split.test, tests)
    return {"longer": by_length, "ngram": by_ngrams}


# ---- training -------------------------------------------------------------------------------------------------------


def training_pairs(args: argparse.Namespace, pairs: Pairs) -> tuple[Pairs, int, int]:
    """(the pairs of all epochs, one epoch after the other; how many are spoilt; how many epochs).

    Every epoch has spoilt texts of its own, so the trainer makes one pass over all epochs (--epochs 1.5: 3/4 of one
    over two). The pairs are in each twice: they are harder to tell apart than the up to --derived spoilt ones of each.
    """
    epochs = max(1, math.ceil(args.epochs))
    spoilt: Pairs = []
    for epoch in range(epochs if args.derived else 0):
        spoilt += derived_pairs(pairs, args.derived, args.without, args.seed, epoch)
    times = 2 * epochs if spoilt else epochs
    return pairs * times + spoilt, len(spoilt), epochs


def as_dataset(pairs: Pairs):
    """TRL's columns, and the length by which the sampler groups batches: characters of the prompt and a response."""
    from datasets import Dataset

    rows = []
    for pair in pairs:
        prompt, chosen, rejected = pair.texts
        length = len(prompt) + max(len(chosen), len(rejected))
        rows.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "length": length})
    return Dataset.from_list(rows)


def train(
    args: argparse.Namespace, pairs: Pairs, passes: float, stop: Pairs, base: str, into: str, start: Path | None = None
) -> list[dict]:
    """Train and save rm/, from the last checkpoint in `into` or from an adapter, `start`; returns the trainer's log."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback
    from trl import RewardConfig, RewardTrainer

    checkpoints = args.run / into

    class FiniteRewardTrainer(RewardTrainer):
        def compute_loss(self, *inputs, **options):
            loss = super().compute_loss(*inputs, **options)
            if not torch.isfinite(loss[0] if isinstance(loss, tuple) else loss):
                place = f"at step {self.state.global_step}; the last good checkpoint is in {checkpoints}"
                run_folder.fail(f"the loss is not finite {place}: run again with --redo and a lower --learning-rate")
            return loss

    tokenizer = load_tokenizer(base)  # first, because what is wrong with it shows in a second
    torch.manual_seed(args.seed)  # the head begins at random
    # On a CPU the fused attention is slower with short padded rows; scoring keeps it: it spares memory on long ones.
    attention = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    model = load_base(AutoModelForSequenceClassification, base, args.bits, num_labels=1, **attention)
    adapter = lora(args.rank, "SEQ_CLS", modules_to_save=["score"])
    if start:
        model, adapter = PeftModel.from_pretrained(model, start, is_trainable=True), None

    updates = math.ceil(len(pairs) / (args.batch_size * args.accumulation)) * passes
    check_every = max(1, math.ceil(updates / args.checks))
    batch, accumulation = trainers.per_process(args.batch_size, args.accumulation)
    config = RewardConfig(
        output_dir=str(checkpoints), seed=args.seed, num_train_epochs=passes, max_length=args.max_length,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=args.batch_size, learning_rate=args.learning_rate / (2 if start else 1),
        # Trainings are of some hundred updates: Adam's 0.999 would average the squared gradients over all of them.
        lr_scheduler_type="cosine", adam_beta2=0.98, warmup_steps=0.1,  # a share of all steps
        logging_steps=max(1, check_every // 4), logging_nan_inf_filter=False,
        eval_strategy="steps", eval_steps=check_every, metric_for_best_model="eval_loss", load_best_model_at_end=True,
        save_strategy="steps", save_steps=check_every, save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # the checks without a gain so far
        # Batches of like length waste less on padding. The sampler finds the lengths in a column that TRL would remove.
        train_sampling_strategy="group_by_length", remove_unused_columns=False,
        pad_to_multiple_of=16,  # every new shape costs a CPU's kernels a compilation
        **trainers.trainer_settings(model, autocast=True),
    )  # fmt: skip
    bar = trainers.progress_callback("reward model", ["loss", "accuracy", "eval_loss"])
    parts = {"train_dataset": as_dataset(pairs), "eval_dataset": as_dataset(stop), "processing_class": tokenizer}
    callbacks = [bar, EarlyStoppingCallback(args.patience)]
    trainer = FiniteRewardTrainer(model, config, **parts, peft_config=adapter, callbacks=callbacks)
    trainers.fix_trainer(trainer)
    compute_in_fp32(trainer.model.base_model.model.score.modules_to_save["default"])  # as it will score
    too_long = len(pairs) - len(trainer.train_dataset)
    if too_long == len(pairs) or not len(trainer.eval_dataset):
        run_folder.fail(f"all pairs are longer than --max-length {args.max_length} tokens; raise it")
    if too_long:
        print(f"02: {too_long} of {len(pairs)} pairs, spoilt ones included, exceed --max-length and are left out")
    trainers.train_from(trainer, trainers.last_checkpoint(checkpoints))
    if run_folder.main_process():  # a calibration of a run that was killed belongs to other weights
        (args.run / "rm" / "calibration.json").unlink(missing_ok=True)
    trainer.save_model(str(args.run / "rm"))
    return trainer.state.log_history


# ---- what it has learnt ---------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, rm: RewardModel, test: Pairs, tests: Tests) -> dict:
    """How often the reward model is right in each test, and how its scores follow length; writes rm_eval.jsonl."""
    import numpy as np
    from scipy.stats import spearmanr

    def score(rivals: list[Rival]) -> list[float]:
        conversations = [[*test[place].prompt, {"role": "assistant", "content": text}] for place, text in rivals]
        return rm.score_conversations(conversations)

    rates, scores = accuracy(score, test, tests)
    rows = []
    for place, pair in enumerate(test):
        query, chosen, rejected = pair.texts
        row = {"id": pair.id, "query": query, "chosen": chosen, "rejected": rejected}
        row |= {"chosen_score": scores[place, chosen], "rejected_score": scores[place, rejected]}
        rows.append(row)
    records.write(args.run / "rm_eval.jsonl", rows)

    # Chosen texts are all good: where the longer of them score higher, the score has learnt length.
    good_scores, lengths = [row["chosen_score"] for row in rows], [len(row["chosen"]) for row in rows]
    pearson, spearman = 0.0, 0.0
    if len(set(good_scores)) > 1 and len(set(lengths)) > 1:  # else there is nothing to correlate
        pearson = round(float(np.corrcoef(good_scores, lengths)[0, 1]), 4)
        spearman = round(float(spearmanr(good_scores, lengths)[0]), 4)  # of ranks: one very long text decides nothing
    return {"eval": rates, "length_correlation": pearson, "length_rank_correlation": spearman}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def write_card(args: argparse.Namespace, base: str, figures: dict) -> None:
    """rm/README.md, which hubs show as the model card, and the curves of the training in it."""
    import jinja2

    template = (run_folder.ROOT / "common/templates/rm_card.md").read_text(encoding="utf-8")
    card = jinja2.Template(template, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = card.render(figures, base=base, bits=args.bits, percent=percent)
    run_folder.replace_file(args.run / "rm" / "README.md", text)

    panels: dict[str, dict] = {"loss": {}, "accuracy": {}}
    for name, curves in panels.items():
        for label, key in (("training", name), ("held out", f"eval_{name}")):
            curves[label] = [(entry["step"], entry[key]) for entry in figures["log"] if key in entry]
    trainers.draw_curves(args.run / "rm" / "training.svg", panels)


def score_file(args: argparse.Namespace, base: str) -> None:
    """Print every row of --score as it is, with its score, in order, a batch at a time."""
    rm = RewardModel(args.run / "rm", base, args.prompts)
    candidates = records.stream(args.score, records.Candidate, unique=False)
    rows = records.numbered_rows(args.score)  # as they stand in the file, beside the records
    while batch := list(itertools.islice(candidates, args.batch_size_generate)):
        for score in rm.score([(candidate.query, candidate.response) for candidate in batch]):
            _, row = next(rows)
            print(json.dumps({**row, "score": round(score, 6)}, ensure_ascii=False))


def measure(args: argparse.Namespace, base: str, split: Split, log: list[dict]) -> tuple[RewardModel, dict]:
    """Calibrate and test what was trained; the figures are those of the summary."""
    peak = peak_gib()  # of the training alone
    rm = RewardModel(args.run / "rm", base, args.prompts, args.bits)
    rm.calibrate(split.stop, args.length_tolerance, args.seed)
    tests = build_tests(args, split)
    nulls = null_baselines(args, split, tests)
    figures = evaluate(args, rm, split.test, tests)
    for name, test in figures["eval"].items():
        test["null"] = {rule: rates[name] for rule, rates in nulls.items()}
    figures["baselines"] = {rule: rates["all"] for rule, rates in nulls.items()}
    figures["bought"] = bought_by_search(args, rm, split.test)
    return rm, figures | {"leaks": split.leaks, "leaked": bool(split.leaking), "log": log, "peak_gib": peak}


def bought_by_search(args: argparse.Namespace, rm: RewardModel, pairs: Pairs) -> dict:
    """How often a search finds what scores above a chosen text of these pairs: "all", and by family."""
    prompts = {pair.query: pair.prompt for pair in pairs}
    chosen = {(pair.query, pair.texts[1].strip()) for pair in pairs}
    drawn = sorted(chosen, key=lambda row: run_folder.digest(args.seed, "bought", *row))

    def score(rows: list[tuple[str, str]]) -> list[float]:
        said = [[*prompts[asked], {"role": "assistant", "content": text}] for asked, text in rows]
        return rm.score_conversations(said)

    sources = sources_of(drawn[: min(SEARCHED, args.stress_size)], args.seed)
    return bought(*search_scores(score, sources, args.seed))


def write_results(args: argparse.Namespace, base: str, started: float, figures: dict) -> None:
    """Write the card and the summary, and print the tests."""
    write_card(args, base, figures)
    run_folder.write_summary(args, "02_summary", started, figures)
    for name, test in figures["eval"].items():
        share, lo, hi = (percent(test[key]) for key in ("value", "lo", "hi"))
        longer, ngrams = (percent(test["null"][rule]["value"]) for rule in ("longer", "ngram"))
        print(f"02: {name:28} {share:>6}  [{lo}, {hi}]  longer {longer}, n-grams {ngrams}, n {test['n']}")
    families = ", ".join(f"{name} {percent(rate['value'])}" for name, rate in figures["bought"].items())
    print(f"02: bought by a search on {figures['bought']['all']['n']} chosen texts: {families}")
    print(f"02: correlation of score and length within chosen texts {figures['length_correlation']:+.2f}")
    print(f"02: reward model in {args.run / 'rm'}")


def harden(args: argparse.Namespace, base: str, split: Split, settings: dict, started: float) -> int:
    """--hard: go on from the finished rm/ with pairs of its own rollouts, and as many that it has seen."""
    begun = hard.begin(args, base, split, settings) if run_folder.main_process() else None
    begun = trainers.gather_rows([begun])[0]
    if not begun:
        print(f"02: --hard done already, see {args.run / '02_summary.json'}")
        return 0
    seen = random.Random(args.seed).sample(split.train, min(len(split.train), len(begun.train)))
    pairs, _, epochs = training_pairs(args, begun.train + seen)
    stop = split.stop + derived_pairs(split.stop, min(args.derived, 1), args.without, args.seed) + begun.held_out
    log = train(args, pairs, args.epochs / epochs, stop, base, hard.CHECKPOINTS, args.run / hard.BEFORE)
    if not run_folder.main_process():
        return 0
    rm, figures = measure(args, base, split, log)
    after = {"eval": figures["eval"], "bought": figures["bought"], "rollouts": hard.won(rm, begun.held_out)}
    summary = run_folder.read_summary(args.run / hard.BEFORE, "02_summary")
    started -= summary.pop("seconds")  # the summary is of all that this reward model took
    figures = summary | figures | {"hard": begun.figures | {"after": after}}
    figures["ledger"] = open_store(args, "02").ledger()
    write_results(args, base, started, figures)
    before = begun.figures["before"]["rollouts"]["value"]
    print(f"02: held-out pairs of rollouts {percent(before)} before, {percent(after['rollouts']['value'])} after")
    begun.stage.finish()
    return 0


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base = policy_path(args)
    if args.score:
        silence_libraries()
        score_file(args, base)
        return 0
    split = split_pairs(args)
    run_folder.open_run(args.run)
    settings = run_folder.settings(args, "data", "training", "models") | {"base": base}
    # A resumed run may use smaller batches to fit in memory; what counts is how many pairs make an update.
    settings["batch"] = settings.pop("batch_size") * settings.pop("accumulation")
    del settings["batch_size_generate"]
    if args.hard:
        silence_libraries()
        return harden(args, base, split, settings, started)
    stage = run_folder.Stage(args.run, "02_rm", ["rm", "rm_eval.jsonl", "rm_checkpoints"], settings, args.redo)
    if stage.done and run_folder.read_summary(args.run, "02_summary"):
        print(f"02: done already, see {args.run / '02_summary.json'}")
        return 0

    silence_libraries()
    pairs, derived, epochs = training_pairs(args, split.train)
    stop = split.stop + derived_pairs(split.stop, min(args.derived, 1), args.without, args.seed)
    log = train(args, pairs, args.epochs / epochs, stop, base, "rm_checkpoints")
    if run_folder.main_process():
        figures = {"train_pairs": len(split.train), "derived_pairs": derived, "test_pairs": len(split.test)}
        write_results(args, base, started, figures | measure(args, base, split, log)[1])
        stage.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
