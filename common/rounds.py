"""Rounds of step 2: the reward model is searched for what buys it, and goes on training against what was found.

The search (search.py) is made on chosen texts of the training pairs, with the kinds and wordings of training and free
mutations. How often texts held out from training are bought says when to stop.
"""

import argparse
import json
from typing import NamedTuple

from common import run_folder, trainers
from common.pairs import Split
from common.records import Preference
from common.reward_model import RewardModel
from common.search import Try, bought, search_scores, sources_of
from common.spoilt import Pairs, Source

SEARCHED = 64  # training texts in a round; of the held-out texts fewer
HELD_OUT = 40
KEPT = 8  # tries of a text that become pairs: what the reward model likes best
MARGIN = 1.0  # standard deviations of the score that these may be below their text
ENOUGH = 0.05  # share of held-out texts bought below which another round is not worth it


class Round(NamedTuple):
    """What a search of the reward model brought."""

    bought: dict  # the rate at which held-out texts are bought
    train: Pairs
    held_out: Pairs  # to stop by


def folder(number: int) -> str:
    """Where a round keeps what its search brought and its checkpoints, in the run folder."""
    return f"rm_checkpoints/round_{number}"


def search_round(args: argparse.Namespace, base: str, split: Split, number: int) -> Round:
    """Search rm/ for what buys it, once: a run that was killed goes on with what is in the round's file."""
    file = args.run / folder(number) / "found.json"
    if run_folder.main_process() and not file.is_file():
        rm = RewardModel(args.run / "rm", base, args.prompts, args.bits)
        rm.calibrate(split.stop, args.length_tolerance, args.seed)
        rm.calibration_file.unlink()  # by it others know a model whose training has ended
        most = len(split.train) // (2 * args.rounds)  # with as many that it has seen: one showing of all in all
        run_folder.replace_file(file, json.dumps(found(rm, split, args.seed, number, most), ensure_ascii=False))
    trainers.gather_rows([])  # the other processes wait
    rows = json.loads(file.read_text(encoding="utf-8"))
    pairs = {name: [Preference(**row) for row in rows[name]] for name in ("train", "held_out")}
    return Round(rows["bought"], **pairs)


def found(rm: RewardModel, split: Split, seed: int, number: int, most: int) -> dict:
    """A round's file, of at most so many pairs of either sort: other training texts each round, the same held-out."""
    training = search_chosen(rm, split.train, SEARCHED, f"{seed}, round {number}", held_out=False)
    stopping = search_chosen(rm, split.stop, HELD_OUT, seed, held_out=False)
    sides = {"train": winners(split.train, most, *training), "held_out": winners(split.stop, most, *stopping)}
    rows = {name: [pair.model_dump(exclude_none=True) for pair in pairs] for name, pairs in sides.items()}
    return {"bought": bought(*stopping[1:])["all"], **rows}


def over(rounds: list[Round]) -> bool:
    """Whether few held-out texts were bought in the last round, or no fewer in the last two than in the best before."""
    rates = [one.bought["value"] for one in rounds]
    return rates[-1] < ENOUGH or (len(rates) > 2 and min(rates[-2:]) >= min(rates[:-2]))


def search_chosen(
    rm: RewardModel, pairs: Pairs, most: int, seed: int | str, held_out: bool
) -> tuple[list[Source], list[list[Try]], list[float]]:
    """(chosen texts of these pairs, at most so many; what was tried on each; the score of each)."""
    prompts = {pair.query: pair.prompt for pair in pairs}
    chosen = {(pair.query, pair.texts[1].strip()) for pair in pairs}
    drawn = sorted(chosen, key=lambda row: run_folder.digest(seed, "bought", *row))[:most]

    def score(rows: list[tuple[str, str]]) -> list[float]:
        said = [[*prompts[asked], {"role": "assistant", "content": text}] for asked, text in rows]
        return rm.score_conversations(said)

    sources = sources_of(drawn, seed)
    return sources, *search_scores(score, sources, seed, held_out)


def winners(pairs: Pairs, most: int, sources: list[Source], found: list[list[Try]], bar: list[float]) -> Pairs:
    """Pairs of a text and each of the KEPT tries that score highest; of all texts' those that gain most by it."""
    prompts = {pair.query: pair.prompt for pair in pairs}
    gains = []
    for source, tries, own in zip(sources, found, bar, strict=True):
        for one in sorted(tries, key=lambda one: -one.score)[:KEPT]:
            if one.score > own - MARGIN:
                gains.append((one.score - own, source, one))
    won = []
    for _, source, one in sorted(gains, key=lambda gain: -gain[0])[:most]:
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (source.greeting, one.text))
        why = f"searched: {', '.join(one.kinds)}"
        won.append(Preference(prompt=prompts[source.query], chosen=chosen, rejected=rejected, why=why))
    return won
