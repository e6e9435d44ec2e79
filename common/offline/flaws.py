"""The flaws that the rule-based critic can find in a greeting, and write into one.

The critic is the stand-in for a language model under --offline. It knows only what can be measured in a text, and it
never sees a label, except where a prompt shows one (the Reflector's).

A detector takes (query, response) and returns how sure it is of the flaw: 0 no, 1 a hint of it, 2 clearly.
A writer takes (greeting, random numbers) and returns the greeting with the flaw in it.
"""

import random
import re
from collections.abc import Callable
from functools import lru_cache, partial

from common import constraints, lexicon, signs
from common.characters import BACKWARDS, BROKEN, ODD, REFERENCES, character_model, clause_ngrams
from common.lexicon import LEXICON, OCCASIONS, STOCK, clauses, occasions_in, recipients_in
from common.records import Reference, read

# ---- detectors ------------------------------------------------------------------------------------------------------


def _matches(pattern: str, query: str, response: str) -> int:
    return 2 if re.search(pattern, response) else 0


def _shows(sign: Callable[[str, str], bool], query: str, response: str) -> int:
    return 2 if sign(query, response) else 0


def _wrong_occasion(query: str, response: str) -> int:
    wanted = occasions_in(query)
    if not wanted:  # a word of thanks, say: only wishes for a feast of which the query has no sign are out of place
        for name, occasion in OCCASIONS.items():
            named = occasion["signature"]
            wish = rf"({named})[^，。！？]{{0,2}}(快乐|喜|大吉|愉快|安康)|(贺|恭喜|祝)[^，。！？]{{0,4}}({named})"
            if named and re.search(wish, response) and not lexicon.signs_of(lexicon.kindred(name), query):
                return 2
        return 0
    if signs.other_occasion(query, response):
        return 2
    if lexicon.signs_of(wanted, response):
        return 0
    return 1 if occasion_model().predict([response])[0] in lexicon.kindred(*wanted) else 2


def fit_occasions(references: list[Reference]):
    """Naive Bayes on characters and pairs: the occasion whose references a greeting is most like.

    A weak measure: of held-out greetings without a sign of the occasion asked for, it finds 99% more like another one's
    if they were written for another, but also 63% if they were not. Without it, all of them would count as misplaced.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import ComplementNB  # made for classes of very different size
    from sklearn.pipeline import make_pipeline

    known = [reference for reference in references if getattr(reference, "occasion", "") in OCCASIONS]
    # What only one greeting has tells that greeting, not its occasion.
    features = CountVectorizer(analyzer="char", ngram_range=(1, 2), binary=True, min_df=2)
    texts, occasions = [reference.response for reference in known], [reference.occasion for reference in known]
    return make_pipeline(features, ComplementNB()).fit(texts, occasions)


@lru_cache
def occasion_model():
    return fit_occasions(read(REFERENCES, Reference))


def _cliche(query: str, response: str) -> int:
    phrases = [phrase for phrase in STOCK if phrase in response]
    share = sum(map(len, phrases)) / max(1, len("".join(clauses(response))))
    if len(phrases) >= 3 or share > 0.5:
        return 2
    return 1 if len(phrases) == 2 or share > 0.3 else 0


def _repetition(query: str, response: str) -> int:
    parts = [clause for clause in clauses(response) if len(clause) >= 3]
    if len(set(parts)) < len(parts) or signs.repeats(response):
        return 2
    runs = clause_ngrams(response, 4)
    return 1 if len(set(runs)) < len(runs) else 0


def _broken(query: str, response: str) -> int:
    model = character_model()
    strangeness, breaks = model.strangeness(response), model.breaks(response)
    if "\ufffd" in response or strangeness > BROKEN or breaks >= 2 or model.backwards(response) > BACKWARDS:
        return 2
    return 1 if strangeness > ODD or breaks else 0


def _register(query: str, response: str) -> int:
    recipients = recipients_in(query)
    if recipients.intersection(LEXICON["elders"]) and re.search(LEXICON["slang"], response):
        return 2
    allowed = 0 if recipients.intersection(LEXICON["intimates"]) else 1  # phrases of an office's circular
    return 2 if len(re.findall(LEXICON["officialese"], response)) > allowed else 0


def _empty(query: str, response: str) -> int:
    images = set(response) & lexicon.IMAGES
    if not images:
        return 2
    if re.search("字|短|一句", query):  # a short one was asked for: one image is enough
        return 0
    parts = [clause for clause in clauses(response) if len(clause) >= 3]
    return 2 if len(images) == 1 or len(parts) < 2 else 0


# ---- writers --------------------------------------------------------------------------------------------------------


def _write_phrase(place: str, phrases: list[str], text: str, rng: random.Random) -> str:
    phrase = rng.choice(phrases)
    return {"replace_by": phrase, "begin_with": phrase + text, "end_with": text + phrase}[place]


def _write_cliche(text: str, rng: random.Random) -> str:
    return text[:2].strip("，。") + "，祝" + "，".join(rng.sample(STOCK, 4)) + "！"


def _write_repetition(text: str, rng: random.Random) -> str:
    parts = [part for part in re.split(r"(?<=[，。！？；])", text) if part]
    at = rng.randrange(len(parts))
    return "".join(parts[: at + 1] + parts[at:])


def _write_truncated(text: str, rng: random.Random) -> str:
    return re.sub(r"[，。！？；]+$", "", text[: max(4, int(len(text) * rng.uniform(0.5, 0.75)))])


def _write_foreign(text: str, rng: random.Random) -> str:
    parts = re.split(r"(?<=[，。！？；])", text)
    parts.insert(rng.randrange(len(parts)), rng.choice(["happy", "forever", "best wishes", "nice"]))
    return "".join(parts)


def _write_broken(text: str, rng: random.Random) -> str:
    parts = re.split(r"([，。！？；])", text)  # clauses at even places, marks at odd ones
    for at in rng.sample(range(0, len(parts), 2), k=min(2, len(parts[::2]))):
        parts[at] = "".join(rng.sample(parts[at], len(parts[at])))
    return "".join(parts)


# ---- the flaws ------------------------------------------------------------------------------------------------------

# What takes code to find, or to write: name -> (detector, writer). The lexicon has the others as signs (signs.py),
# patterns and phrases.
CODE = {
    "wrong_occasion": (_wrong_occasion, None),
    "cliche": (_cliche, _write_cliche),
    "repetition": (_repetition, _write_repetition),
    "truncated": (None, _write_truncated),
    "foreign": (None, _write_foreign),
    "style_ignored": (partial(_shows, constraints.broken), None),
    "register": (_register, None),
    "broken": (_broken, _write_broken),
    "empty": (_empty, None),
    # no flaw, but a rule that people write all the same: step 03 should learn to drop it
    "short": (lambda query, response: 2 if len(response) < 28 else 0, None),
}


class Flaw:
    """How a flaw is spoken of, and how it is found and written. The words are in data/lexicon.json."""

    def __init__(self, name: str, entry: dict):
        self.rule: str = entry["rule"]
        self.strategy: str = entry["strategy"]
        self.spoken_of: str = entry["spoken_of"]  # a rule that matches this speaks of the flaw
        self.family: int = entry["family"]  # one family shares a line of the principles, so that ten lines hold all
        self.detect, self.write = CODE.get(name, (None, None))
        if "sign" in entry:
            self.detect = partial(_shows, getattr(signs, entry["sign"]))
        if "pattern" in entry or "words" in entry:
            self.detect = partial(_matches, entry.get("pattern") or LEXICON["signs"][entry["words"]])
        for place in ("replace_by", "begin_with", "end_with"):
            if place in entry:
                self.write = partial(_write_phrase, place, entry[place])


FLAWS = {name: Flaw(name, entry) for name, entry in LEXICON["flaws"].items()}


@lru_cache(maxsize=20_000)  # every agent, judge and grader looks at the same greetings
def flaws_of(query: str, response: str) -> dict[str, int]:
    """Every flaw that the critic finds, with how sure it is: 1 a hint, 2 clearly. Shortness alone is none."""
    flaws = {}
    for name, flaw in FLAWS.items():
        sure = flaw.detect(query, response)
        if sure and name != "short":
            flaws[name] = sure
    return flaws


def flaws_spoken_of(rules: list[str]) -> list[str]:
    """The flaws that a list of principles or strategies speaks of, as far as the critic understands it."""
    return [name for name, flaw in FLAWS.items() if any(re.search(flaw.spoken_of, rule) for rule in rules)]
