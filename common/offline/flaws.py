"""The flaws that the rule-based critic can find in a greeting, and write into one.

The critic is the stand-in for a language model under --offline. It knows only what can be measured in a text, and it
never sees a label, except where a prompt shows one (the Reflector's).

A detector takes (query, response) and returns how sure it is of the flaw: 0 no, 1 a hint of it, 2 clearly.
A writer takes (greeting, random numbers) and returns the greeting with the flaw in it.
"""

import random
import re
from collections.abc import Iterable
from functools import lru_cache, partial

from common.lexicon import ADDRESS, IMAGES, LEXICON, OCCASIONS, STOCK, clauses, kindred, occasions_in, recipients_in
from common.offline.language import BACKWARDS, BROKEN, ODD, character_model, clause_ngrams, occasion_model

# ---- detectors ------------------------------------------------------------------------------------------------------


def _matches(pattern: str, query: str, response: str) -> int:
    return 2 if re.search(pattern, response) else 0


def _wrong_occasion(query: str, response: str) -> int:
    wanted = occasions_in(query)
    if not wanted:  # a word of thanks, say: only wishes for a feast of which the query has no sign are out of place
        for name, occasion in OCCASIONS.items():
            named = occasion["signature"]
            wish = rf"({named})[^，。！？]{{0,2}}(快乐|喜|大吉|愉快|安康)|(贺|恭喜|祝)[^，。！？]{{0,4}}({named})"
            if named and re.search(wish, response) and not signs_of(kindred(name), query):
                return 2
        return 0
    if any(re.search(OCCASIONS[name]["signature"] or OCCASIONS[name]["signs"], response) for name in wanted):
        return 0
    kin = kindred(*wanted)
    for name in OCCASIONS.keys() - kin:
        signature = OCCASIONS[name]["signature"]
        if signature and re.search(signature, response):
            return 2
    if signs_of(wanted, response):
        return 0
    return 1 if occasion_model().predict([response])[0] in kin else 2


def signs_of(occasions: Iterable[str], text: str) -> bool:
    """Whether the text has a sign of one of these occasions."""
    return any(re.search(OCCASIONS[name]["signs"], text) for name in occasions)


def _wrong_recipient(query: str, response: str) -> int:
    wanted = recipients_in(query) or {"大家", "朋友"}
    parts = clauses(response)
    for words, recipients in ADDRESS.items():
        alone = any(re.fullmatch(f"(亲爱的)?({words})们?", part) for part in parts)  # a clause of its own
        opening = parts and re.match(f"(亲爱的)?({words})[你您]", parts[0])
        if (alone or opening) and wanted.isdisjoint(recipients):
            return 2
    return 0


def _cliche(query: str, response: str) -> int:
    phrases = [phrase for phrase in STOCK if phrase in response]
    share = sum(map(len, phrases)) / max(1, len("".join(clauses(response))))
    if len(phrases) >= 3 or share > 0.5:
        return 2
    return 1 if len(phrases) == 2 or share > 0.3 else 0


def _repetition(query: str, response: str) -> int:
    parts = [clause for clause in clauses(response) if len(clause) >= 3]
    if len(set(parts)) < len(parts):
        return 2
    runs = clause_ngrams(response, 4)
    again = len(runs) - len(set(runs))
    if again >= 3:
        return 2
    return 1 if again else 0


def _truncated(query: str, response: str) -> int:
    if len("".join(clauses(response))) < 4:
        return 2
    if re.search(r"[。！？!?~～…）)」』”♥❤]$", response):
        return 0
    # A short verse may do without a full stop, unless it breaks off after a word that needs another.
    short_verse = len(response) <= 20 and not re.search("[的了和与在把被，、]$|，.{1,5}$", response)
    return 0 if short_verse else 2


def _broken(query: str, response: str) -> int:
    model = character_model()
    strangeness, breaks = model.strangeness(response), model.breaks(response)
    if "\ufffd" in response or strangeness > BROKEN or breaks >= 2 or model.backwards(response) > BACKWARDS:
        return 2
    return 1 if strangeness > ODD or breaks else 0


def _style_ignored(query: str, response: str) -> int:
    text = "".join(clauses(response))
    exact = re.search("(?<![一二三四五六七八九十])([四五六七八十])个?字(?!以内|之内)", query)
    if exact:  # so many characters in all, or in every line
        wanted = {"四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "十": 10}[exact[1]]
        return 2 if len(text) > wanted + 2 and len(text) % wanted > 2 else 0
    if re.search("一句话|一句就好|简短|短句|短一点|字以内", query) and len(text) > 45:
        return 2
    if re.search("古风|文言|古诗|诗词", query):
        classical = re.findall("[君兮之乎矣卿吾汝尔岁朝暮盏樽愿且莫何归与此吟遥伏惟昔今]", text)
        if len(classical) < 2 or re.search("啦|吧|呀|的", text):
            return 2
    plain = re.search("(不要|别用|不用)(成语|套话)", query)
    return 2 if plain and any(phrase in response for phrase in STOCK) else 0


def _register(query: str, response: str) -> int:
    recipients = recipients_in(query)
    if recipients.intersection(LEXICON["elders"]) and re.search(LEXICON["slang"], response):
        return 2
    allowed = 0 if recipients.intersection(LEXICON["intimates"]) else 1  # phrases of an office's circular
    return 2 if len(re.findall(LEXICON["officialese"], response)) > allowed else 0


def _empty(query: str, response: str) -> int:
    images = set(response) & IMAGES
    if not images:
        return 2
    if re.search("字|短|一句", query):  # a short one was asked for: one image is enough
        return 0
    parts = [clause for clause in clauses(response) if len(clause) >= 3]
    return 2 if len(images) == 1 or len(parts) < 2 else 0


# Latin, kana, hangul, Cyrillic: two letters in a row, for one may be an initial.
FOREIGN = r"[A-Za-zÀ-ɏ\u3040-\u30ff\uac00-\ud7af\u0400-\u04ff]{2,}"

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

# What takes code to find, or to write: name -> (detector, writer). The lexicon has the others as patterns and phrases.
CODE = {
    "wrong_occasion": (_wrong_occasion, None),
    "wrong_recipient": (_wrong_recipient, None),
    "cliche": (_cliche, _write_cliche),
    "repetition": (_repetition, _write_repetition),
    "truncated": (_truncated, _write_truncated),
    "foreign": (partial(_matches, FOREIGN), _write_foreign),
    "style_ignored": (_style_ignored, None),
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
        if "pattern" in entry:
            self.detect = partial(_matches, entry["pattern"])
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
