"""What the rule-based critic can measure in a greeting, and write into one."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from common.lexicon import (
    ADDRESS,
    IMAGES,
    LEXICON,
    OCCASIONS,
    OFFICIALESE,
    SLANG,
    STOCK,
    WARM,
    clauses,
    images_in,
    kindred,
    occasions_in,
    recipients_in,
)
from common.records import Reference, read
from common.run_folder import ROOT

REFERENCES = ROOT / "data" / "references.jsonl"
# Nats per pair of neighbours: above ODD the critic has a doubt, above BROKEN it is sure. `python -m common.offline`
# prints what they rest on: greetings that it knows, greetings that it does not, and shuffled ones.
ODD, BROKEN = 5.2, 6.8
# Nats that a clause may gain by being read from its end: 0.7% of greetings that the critic does not know have one
# that gains more, and 92% of the same with one clause reversed.
BACKWARDS = 3.0
RECITED = 0.6  # share of known triples from which a text recites the references; 1% of other good greetings do


class CharacterModel:
    """Which characters follow which in the references: the critic's sense of fluency."""

    def __init__(self, texts: list[str]):
        runs = [part for text in texts for part in clauses(text)]
        self.singles = Counter(c for run in runs for c in run)
        self.total = self.singles.total()
        self.pairs, self.triples = (Counter(gram for run in runs for gram in self.split(run, n)) for n in (2, 3))
        edges = Counter(pair for run in runs for pair in (f"^{run[0]}", f"{run[-1]}$"))
        self.pairs, self.singles = self.pairs + edges, self.singles + Counter({"^": len(runs), "$": len(runs)})

    @staticmethod
    def split(run: str, n: int) -> list[str]:
        return [run[i : i + n] for i in range(len(run) - n + 1)]

    def surprise(self, pairs: list[str]) -> float:
        """Nats: minus the logarithm of how likely each second character is after its first, summed."""
        nats = 0.0
        for pair in pairs:
            backoff = 0.5 * (self.singles[pair[1]] + 0.5) / self.total
            nats -= math.log(0.5 * self.pairs[pair] / (self.singles[pair[0]] + 0.5) + backoff)
        return nats

    def strangeness(self, text: str) -> float:
        """Mean surprise in nats per pair of neighbours; high for jumbled text and for text unlike the references."""
        pairs = [pair for part in clauses(text) for pair in self.split(part, 2)]
        return self.surprise(pairs) / max(1, len(pairs))

    def backwards(self, text: str) -> float:
        """Nats by which a clause of five characters or more reads better from its end, its edges counted; the most."""
        runs = [part for part in clauses(text) if len(part) >= 5]
        ways = [[self.surprise(self.split(f"^{way}$", 2)) for way in (run, run[::-1])] for run in runs]
        return max((forwards - back for forwards, back in ways), default=0.0)

    def breaks(self, text: str) -> int:
        """How often a text that else recites the references jumps, inside a clause, between characters never met.

        0 for text of its own: there the references say nothing about what may follow what.
        """
        parts = clauses(text)
        triples = [triple for part in parts for triple in self.split(part, 3)]
        if sum(triple in self.triples for triple in triples) < RECITED * len(triples):
            return 0
        return sum(pair not in self.pairs for part in parts for pair in self.split(part, 2))


@lru_cache
def character_model() -> CharacterModel:
    return CharacterModel([r.response for r in read(REFERENCES, Reference)])


class OccasionModel:
    """Naive Bayes on characters and pairs of neighbours: what a greeting without a sign of the occasion is most like.

    Of those that it does not know, 96% seem more like another occasion where one was asked for, and 68% where none was:
    a weak measure, but without it all of either kind would be wrong.
    """

    def __init__(self, references: list[Reference]):
        self.greetings: Counter[str] = Counter()
        self.seen: dict[str, Counter] = {name: Counter() for name in OCCASIONS}
        for reference in references:
            occasion = getattr(reference, "occasion", "")
            if occasion in self.seen:
                self.greetings[occasion] += 1
                self.seen[occasion].update(self.features(reference.response))
        self.everywhere = sum(self.seen.values(), Counter())

    @staticmethod
    def features(text: str) -> set[str]:
        return {gram for part in clauses(text) for n in (1, 2) for gram in CharacterModel.split(part, n)}

    def likeness(self, text: str) -> dict[str, float]:
        """Occasion -> nats by which the text is likelier among its greetings than among all."""
        shares = {
            gram: self.everywhere[gram] / self.greetings.total()
            for gram in self.features(text) if self.everywhere[gram] > 1
        }  # fmt: skip
        return {
            name: sum(math.log((seen[g] / share + 2) / (self.greetings[name] + 2)) for g, share in shares.items())
            for name, seen in self.seen.items()
        }

    @staticmethod
    def elsewhere(likeness: dict[str, float], kin: set[str]) -> bool:
        """Whether the text is more like some other occasion than like any of these."""
        return max(likeness[name] for name in OCCASIONS.keys() - kin) > max(likeness[name] for name in kin)


@lru_cache
def occasion_model() -> OccasionModel:
    return OccasionModel(read(REFERENCES, Reference))


def _wrong_occasion(query: str, response: str) -> int:
    asked = occasions_in(query)
    if not asked:  # a word of thanks, say: out of place is only what wishes for a feast that the query has no sign of
        return 2 if any(_wished(name, response) and not _signs_of(kindred(name), query) for name in OCCASIONS) else 0
    if any(re.search(OCCASIONS[name]["signature"] or OCCASIONS[name]["signs"], response) for name in asked):
        return 0
    kin = kindred(*asked)
    others = [OCCASIONS[name]["signature"] for name in OCCASIONS.keys() - kin if OCCASIONS[name]["signature"]]
    if any(re.search(signature, response) for signature in others):
        return 2
    if _signs_of(asked, response):
        return 0
    return 2 if occasion_model().elsewhere(occasion_model().likeness(response), kin) else 1


def _signs_of(occasions: Iterable[str], text: str) -> bool:
    return any(re.search(OCCASIONS[name]["signs"], text) for name in occasions)


def _wished(occasion: str, response: str) -> bool:
    """Whether the response wishes joy of this occasion, and does not only mention it."""
    named = OCCASIONS[occasion]["signature"]
    wish = rf"({named})[^，。！？]{{0,2}}(快乐|喜|大吉|愉快|安康)|(贺|恭喜|祝)[^，。！？]{{0,4}}({named})"
    return bool(named and re.search(wish, response))


def _wrong_recipient(query: str, response: str) -> int:
    asked = recipients_in(query)
    parts = clauses(response)
    addressed = [
        set(fit) for words, fit in ADDRESS.items() if any(re.fullmatch(f"(亲爱的)?({words})们?", p) for p in parts)
    ]
    addressed += [
        set(fit) for words, fit in ADDRESS.items() if parts and re.match(f"(亲爱的)?({words})[你您]", parts[0])
    ]
    return 2 if any(not fit & (asked or {"大家", "朋友"}) for fit in addressed) else 0


def _cliche(query: str, response: str) -> int:
    found = [phrase for phrase in STOCK if phrase in response]
    covered = sum(map(len, found)) / max(1, len("".join(clauses(response))))
    return 2 if len(found) >= 3 or covered > 0.5 else 1 if len(found) == 2 or covered > 0.3 else 0


def _repetition(query: str, response: str) -> int:
    parts = clauses(response)
    if any(n > 1 for part, n in Counter(parts).items() if len(part) >= 3):
        return 2
    runs = Counter(part[i : i + 4] for part in parts for i in range(len(part) - 3))
    again = sum(n - 1 for n in runs.values())
    return 2 if again >= 3 else 1 if again else 0


def _truncated(query: str, response: str) -> int:
    if len("".join(clauses(response))) < 4:
        return 2
    if re.search(r"[。！？!?~～…）)」』”♥❤]$", response):
        return 0
    short_verse = len(response) <= 20 and not re.search("[的了和与在把被，、]$|，.{1,5}$", response)
    return 0 if short_verse else 2


def _foreign(query: str, response: str) -> int:
    return 2 if re.search(r"[A-Za-zÀ-ɏ\u3040-\u30ff\uac00-\ud7af\u0400-\u04ff]{2,}", response) else 0


def _broken(query: str, response: str) -> int:
    strangeness, breaks = character_model().strangeness(response), character_model().breaks(response)
    if "\ufffd" in response or strangeness > BROKEN or breaks >= 2 or character_model().backwards(response) > BACKWARDS:
        return 2
    return 1 if strangeness > ODD or breaks else 0


def _style_ignored(query: str, response: str) -> int:
    text = "".join(clauses(response))
    if exact := re.search("(?<![一二三四五六七八九十])([四五六七八十])个?字(?!以内|之内)", query):
        wanted = {"四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "十": 10}[exact[1]]
        return 2 if len(text) > wanted + 2 and len(text) % wanted > 2 else 0
    if re.search("一句话|一句就好|简短|短句|短一点|字以内", query) and len(text) > 45:
        return 2
    classical = re.findall("[君兮之乎矣卿吾汝尔岁朝暮盏樽愿且莫何归与此吟遥伏惟昔今]", text)
    if re.search("古风|文言|古诗|诗词", query) and (len(classical) < 2 or re.search("啦|吧|呀|的", text)):
        return 2
    return 2 if re.search("(不要|别用|不用)(成语|套话)", query) and any(phrase in response for phrase in STOCK) else 0


def _register(query: str, response: str) -> int:
    asked = recipients_in(query)
    if asked & set(LEXICON["elders"]) and SLANG.search(response):
        return 2
    return 2 if len(OFFICIALESE.findall(response)) >= (1 if asked & set(LEXICON["intimates"]) else 2) else 0


def _empty(query: str, response: str) -> int:
    things, parts = images_in(response), [c for c in clauses(response) if len(c) >= 3]
    wanted_short = re.search("字|短|一句", query) is not None
    return 2 if things == 0 or (not wanted_short and (things == 1 or len(parts) < 2)) else 0


def _short(query: str, response: str) -> int:
    return 2 if len(response) < 28 else 0


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
    at = rng.randrange(len(parts))
    return "".join([*parts[:at], rng.choice(["happy", "forever", "best wishes", "nice"]), *parts[at:]])


def _write_broken(text: str, rng: random.Random) -> str:
    parts = re.split(r"([，。！？；])", text)
    for at in rng.sample(range(0, len(parts), 2), k=min(2, len(parts[::2]))):
        parts[at] = "".join(rng.sample(parts[at], len(parts[at])))
    return "".join(parts)


@dataclass(frozen=True)
class Flaw:
    """A flaw: which rules speak of it, how it is put in words, how it is found, and how it is written on purpose.

    The words are in data/lexicon.json. A flaw with a `pattern` there is found by it; the others have a function above.
    """

    family: int  # flaws of one family share a line of the principles, so that ten lines hold them all
    spoken_of: str  # a rule that matches this speaks of the flaw
    rule: str
    strategy: str
    detect: Callable[[str, str], int]
    write: Callable[[str, random.Random], str] | None

    @classmethod
    def from_lexicon(cls, name: str, entry: dict) -> "Flaw":
        detect, write = globals().get(f"_{name}"), globals().get(f"_write_{name}")
        if "pattern" in entry:
            pattern = re.compile(entry["pattern"])
            detect = lambda query, response: 2 if pattern.search(response) else 0  # noqa: E731
        if "replace_by" in entry:
            write = lambda text, rng: rng.choice(entry["replace_by"])  # noqa: E731
        if "begin_with" in entry:
            write = lambda text, rng: rng.choice(entry["begin_with"]) + text  # noqa: E731
        if "end_with" in entry:
            write = lambda text, rng: text + rng.choice(entry["end_with"])  # noqa: E731
        return cls(entry["family"], entry["spoken_of"], entry["rule"], entry["strategy"], detect, write)


# "short" is no flaw, but a rule that people write all the same: the loop of 03 should learn to drop it.
FLAWS = {name: Flaw.from_lexicon(name, entry) for name, entry in LEXICON["flaws"].items()}


def flaws_of(query: str, response: str) -> dict[str, int]:
    """Every flaw that the critic can find, with how sure it is: 1 a hint, 2 clearly. Shortness alone is none."""
    found = {name: flaw.detect(query, response) for name, flaw in FLAWS.items() if name != "short"}
    return {name: sure for name, sure in found.items() if sure}


def flaws_spoken_of(rules: list[str]) -> list[str]:
    """The flaws that a list of principles or strategies speaks of, as far as the critic understands it."""
    return [name for name, flaw in FLAWS.items() if any(re.search(flaw.spoken_of, rule) for rule in rules)]


def praise(query: str, response: str) -> list[str]:
    """The strengths that the critic can find, in words."""
    points = []
    if images_in(response) >= 2:
        points.append("有具体的意象：" + "、".join(sorted(set(response) & IMAGES)[:4]))
    if any(re.search(OCCASIONS[name]["signs"], response) for name in occasions_in(query)):
        points.append("切合场合：" + "、".join(sorted(occasions_in(query))))
    if "您" in response or "你" in response:
        points.append("直接对人说话，有称呼")
    if WARM.search(response):
        points.append("语气温暖：" + WARM.search(response)[0])
    if character_model().strangeness(response) <= ODD:
        points.append("读来顺口")
    return points


def grades(query: str, response: str) -> dict[str, int]:
    """The five grades of the rubric (1-3), from the same measurements; no character is counted, only clauses."""
    flaws = flaws_of(query, response)
    sure = {name for name, how in flaws.items() if how == 2}
    misdirected = bool(sure & {"wrong_occasion", "wrong_recipient"})
    spoilt = bool(sure & {"meta", "advertising", "request", "flattery", "placeholder", "broken"})
    contents = {c for c in clauses(response) if len(c) >= 3 and not any(s in c for s in STOCK)}
    unfinished = bool(sure & {"truncated", "repetition", "foreign"})
    language = 1 if spoilt or unfinished else 2 if flaws.keys() & {"broken", "repetition"} else 3
    creativity = 1 if spoilt or misdirected or "cliche" in flaws else min(3, 1 + images_in(response) // 2)
    rude = bool(sure & {"offensive", "register"})
    emotion = (
        1 if spoilt or misdirected or rude else 1 + bool(WARM.search(response)) + bool(re.search("[你您咱]", response))
    )
    culture = 1 if spoilt or misdirected or rude or sure & {"taboo", "style_ignored"} else 3
    richness = 1 if spoilt or "repetition" in sure else min(3, max(1, len(contents)))
    return {
        "language": language,
        "creativity": creativity,
        "emotion": emotion,
        "culture": culture,
        "richness": richness,
    }
