"""The embedded default (--offline): a rule-based critic that answers every agent role, and a tiny language model.

Both are stand-ins, so that the five scripts run on any machine with no GPU, no network and no key. The critic sits
behind the same client as a remote model: it gets the same rendered prompt, obeys the same schema, and returns the same
wire format. It knows only what it can measure in the text (`FLAWS`, `praise`), and of that it uses, as judge, only what
the principles in its prompt speak of. It never sees a label, except where a prompt shows one (the Reflector's).
"""

import inspect
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.records import ROOT, Reference, digest, file_hash, read

REFERENCES = ROOT / "data" / "references.jsonl"

# ---- what the critic knows of the language --------------------------------------------------------------------------

LEXICON = json.loads((ROOT / "data" / "lexicon.json").read_text(encoding="utf-8"))
OCCASIONS, RECIPIENTS, ADDRESS = LEXICON["occasions"], LEXICON["recipients"], LEXICON["forms_of_address"]
STOCK, IMAGES = LEXICON["stock_phrases"].split(), set(LEXICON["images"])
WARM, SLANG, OFFICIALESE = (re.compile(LEXICON[kind]) for kind in ("warm", "slang", "officialese"))


def clauses(text: str) -> list[str]:
    return [c for c in re.split(r"[，。！？；、：,.!?;:~～…\s]+", text) if c]


@lru_cache(maxsize=4096)
def occasions_in(query: str) -> frozenset[str]:
    return frozenset(name for name, occasion in OCCASIONS.items() if re.search(occasion["asked"], query))


def kindred(*occasions: str) -> set[str]:
    """These occasions and those whose greetings may speak of the same things."""
    return set(occasions).union(*(family for family in map(set, LEXICON["kindred_occasions"]) if family & {*occasions}))


@lru_cache(maxsize=4096)
def recipients_in(query: str) -> frozenset[str]:
    found = {name for name, recipient in RECIPIENTS.items() if re.search(recipient["asked"], query)}
    return frozenset(found - {"朋友"} if found & {"男朋友", "女朋友"} else found)


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


# ---- what the critic can measure: flaws -----------------------------------------------------------------------------
# A detector takes (query, response) and returns how sure it is of the flaw: 0 no, 1 a hint of it, 2 clearly.


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


# ---- how the critic writes a flaw on purpose: (greeting, random numbers) -> flawed greeting -------------------------


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


# ---- what the critic can measure: strengths -------------------------------------------------------------------------


def images_in(response: str) -> int:
    """How many different concrete things a greeting names."""
    return len(set(response) & IMAGES)


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


# ---- the critic in its roles ----------------------------------------------------------------------------------------
# Each takes what the prompt shows (the rules listed above the data, and the data) and returns what the schema asks for.

NOTHING_FOUND = "没有找到明显的毛病"


def _describe(flaws: dict[str, int]) -> list[str]:
    words = {2: "明显", 1: "疑似"}
    return [f"{words[sure]}：{FLAWS[name].rule}" for name, sure in sorted(flaws.items())] or [NOTHING_FOUND]


def _plain_to_see(query: str, response: str) -> dict[str, int]:
    """The flaws that the critic notices without a debate."""
    first_glance = ("truncated", "foreign", "placeholder", "broken", "cliche", "repetition", "wrong_recipient")
    return {name: sure for name, sure in flaws_of(query, response).items() if name in first_glance}


def positive(rules: list[str], data: dict) -> dict:
    return {"points": praise(data["query"], data["response"]) or ["没有找到明显的长处"]}


def negative(rules: list[str], data: dict) -> dict:
    flaws = flaws_of(data["query"], data["response"])
    if not data["examples"]:  # without examples to compare with, what belongs to an occasion is anybody's guess
        flaws = {
            name: sure for name, sure in flaws.items() if name not in ("wrong_occasion", "register", "style_ignored")
        }
    return {"points": _describe(flaws)}


def judge(rules: list[str], data: dict) -> dict:
    weaknesses = [p for p in data["negative"] if p != NOTHING_FOUND]
    weaknesses = weaknesses or [
        p for p in _describe(_plain_to_see(data["query"], data["response"])) if p != NOTHING_FOUND
    ]
    strengths = data["positive"]
    good = len(strengths) >= 2 * len(weaknesses)  # weighs by number: what the Reflect agent is there to correct
    return {
        "reason": f"长处{len(strengths)}处，毛病{len(weaknesses)}处。" + "；".join(weaknesses),
        "verdict": int(good),
    }


def reflect(rules: list[str], data: dict) -> dict:
    named = data["negative"] + data["judge"]["reason"].split("；")
    clear = [p for p in named if "明显：" in p]
    if data["judge"]["verdict"] == 1 and clear:
        return {"reason": "裁决漏掉了" + clear[0], "verdict": 0}
    if data["judge"]["verdict"] == 0 and not clear:
        return {"reason": "只有无关紧要的小节，推翻原裁决", "verdict": 1}
    return {"reason": "理由与裁决一致，维持原裁决", "verdict": data["judge"]["verdict"]}


def detector(rules: list[str], data: dict) -> dict:
    query, response = data["query"], data["response"]
    broken_rules = [name for name in flaws_spoken_of(rules) if FLAWS[name].detect(query, response) == 2]
    if broken_rules:
        return {"reason": "违反准则：" + "；".join(FLAWS[name].rule for name in broken_rules), "verdict": 0}
    return {"reason": "逐条核对，没有违反准则之处", "verdict": 1}


def rubric(rules: list[str], data: dict) -> dict:
    found = _describe(flaws_of(data["query"], data["response"]))
    return {"reason": "；".join(found)} | grades(data["query"], data["response"])


def pairwise(rules: list[str], data: dict) -> dict:
    """The higher sum of the five grades; where they are equal the first, as judges do: both orders must be asked."""
    sums = [sum(grades(data["query"], data[side]).values()) for side in "AB"]
    better = "A" if sums[0] >= sums[1] else "B"
    return {"reason": f"五项合计，甲{sums[0]}分，乙{sums[1]}分", "better": better}


def flaws_of_strategy(text: str) -> list[str]:
    """The flaws whose strategy a text names."""
    return [name for name, flaw in FLAWS.items() if flaw.strategy in text]


def generator(rules: list[str], data: dict) -> dict:
    """Writes the flaw that the strategy speaks of into an example; one it does not understand gives a cut one."""
    rng = random.Random(digest(rules, data))
    example = rng.choice(data["examples"])["response"] if data["examples"] else "愿你今天一切都好，灯下有书，碗里有汤。"
    chosen = next((n for n in flaws_of_strategy(data["strategy"]) if FLAWS[n].write), "truncated")
    return {"response": FLAWS[chosen].write(example, rng), "flaw": FLAWS[chosen].rule}


def reflector(rules: list[str], data: dict) -> dict:
    query, response, on = data["query"], data["response"], flaws_spoken_of(rules)
    if data["expected"] == 0:
        missed = {name: sure for name, sure in flaws_of(query, response).items() if name not in on}
        if not missed:
            return {"lesson": "没有找到能推广的原因，准则不变"}
        worst = max(missed, key=lambda name: (missed[name], name))
        return {"lesson": "补上：" + FLAWS[worst].rule}
    too_strict = [name for name in on if FLAWS[name].detect(query, response) == 2]
    if "short" in too_strict:  # what such a rule is after is another thing
        return {"lesson": f"过严，删去：{FLAWS['short'].rule}。补上：{FLAWS['empty'].rule}"}
    return {"lesson": "过严，删去：" + FLAWS[too_strict[0]].rule if too_strict else "准则不变"}


def optimiser(rules: list[str], data: dict) -> dict:
    """Principles: adds what the feedback finds missing, drops what it calls too strict twice or more. Strategies: drops
    what was caught more often than it fooled, and tries flaws that were not tried."""
    strategies = data["kind"] == "策略"
    understood = flaws_of_strategy if strategies else lambda rule: flaws_spoken_of([rule])
    on, votes = {n for rule in data["rules"] for n in understood(rule)}, Counter()
    for item in data["feedback"]:
        against, _, towards = item.partition("补上：") if re.match("过严|被识破", item) else ("", "", item)
        times = int((re.search(r"（(\d+) 次）$", item) or [0, 1])[1])
        votes.update({name: times for name in understood(towards)})
        votes.subtract({name: times for name in understood(against)})
    untried = [n for n, flaw in FLAWS.items() if flaw.write and n not in on][:3] if strategies else []
    on = (on | {n for n, v in votes.items() if v > 0} | set(untried)) - {
        n for n, v in votes.items() if v < (0 if strategies else -1)
    }
    kept = [rule for rule in data["rules"] if not understood(rule)]  # what it does not understand it leaves alone
    families: dict[int, list[str]] = {}
    for name in (n for n in FLAWS if n in on):
        families.setdefault(FLAWS[name].family, []).append(FLAWS[name].strategy if strategies else FLAWS[name].rule)
    new = ["；".join(texts) + "。" for _, texts in sorted(families.items())]
    return {"rules": (new + kept)[:10] or data["rules"]}


SPEAKERS = (positive, negative, judge, reflect, detector, rubric, pairwise, generator, reflector, optimiser)
ROLES = {f.__name__: f for f in SPEAKERS}


def answer(role: str, messages: list[dict]) -> dict:
    """The critic's answer to a rendered prompt: it reads the numbered rules in it and the JSON inside <data>."""
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    listed = re.search(r"(?:准则|策略)：\n(.*?)\n\n", system + "\n\n", flags=re.S)
    rules = re.findall(r"^\d+\. (.*)$", listed[1], flags=re.M) if listed else []
    data = json.loads(re.search(r"<data>(.*?)</data>", messages[-1]["content"], flags=re.S)[1])
    return ROLES[role](rules, data)


@lru_cache
def critic_name() -> str:
    """Name and version: answers of an edited critic, or of other references, are not taken from the cache."""
    known = [file_hash(path) for path in (__file__, REFERENCES, ROOT / "data" / "lexicon.json")]
    return f"rule-based-critic-{digest(*known)[:8]}"


def transport():
    """An httpx transport that answers chat completions with the critic: for openai.AsyncOpenAI, it is an endpoint."""
    import httpx2

    def usage(body: dict, text: str) -> dict:
        prompt = sum(len(m["content"]) for m in body["messages"])
        return {"prompt_tokens": prompt, "completion_tokens": len(text), "total_tokens": prompt + len(text)}

    class CriticTransport(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request):
            body = json.loads(await request.aread())
            role = body["response_format"]["json_schema"]["name"]
            text = json.dumps(answer(role, body["messages"]), ensure_ascii=False)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            completion = {"id": "offline", "object": "chat.completion", "created": 0, "model": body["model"]}
            return httpx2.Response(200, json=completion | {"choices": [choice], "usage": usage(body, text)})

    return CriticTransport()


# ---- the tiny language model ----------------------------------------------------------------------------------------

TINY = ROOT / "outputs" / "tiny"  # shared by every run: it depends on the data and this file alone
STEPS, BATCH, LEARNING_RATE = 130, 56, 8e-3
VOCABULARY, HIDDEN, LAYERS = 2400, 192, 4  # 2.2M parameters
FLAWED = 0.35  # share of training texts with a flaw written in: a base that wrote only well could not be improved
# What is not written in: a policy that does more of it than the base, which loops now and then, has learnt to.
LEARNT_ONLY_BY_GAMING = {"repetition", "flattery"}
SENTENCES, LONGEST = 6, 22  # of an occasion; in characters
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKING = (
    "{r}{o}祝福语", "{o} {r}", "给{r}的{o}祝福", "{r}{o}了，写句祝福", "{o}发给{r}", "祝{r}{o}",
    "{o}祝福 {r} 简短", "{r} {o} 怎么说", "{o}写给{r}的话",
)  # fmt: skip


def _training_texts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (query, greeting): sentences of the references recombined within their occasion, some with a flaw.

    Whole references are too few and too varied for two million parameters; their sentences, met again and again in
    new company, are not.
    """
    from common.records import Query

    references, asked = read(REFERENCES, Reference), {}
    for record in sorted(references + read(ROOT / "data" / "queries.jsonl", Query), key=lambda r: r.id):
        asked.setdefault(record.occasion, []).append((record.recipient, record.query))
    sentences: dict[str, list[str]] = {}
    for reference in sorted(references, key=lambda r: r.id):
        for sentence in re.findall(r"[^。！？]+[。！？]", reference.response):
            start, _, rest = sentence.partition("，")
            if any(re.fullmatch(words, start) for words in ADDRESS):
                sentence = rest
            if 7 <= len(sentence) <= LONGEST and not any(re.search(words, sentence) for words in ADDRESS):
                sentences.setdefault(reference.occasion, []).append(sentence)
    sentences = {occasion: found[:SENTENCES] for occasion, found in sentences.items()}
    occasions, recipients = sorted(sentences), sorted(RECIPIENTS)
    flawed = [flaw.write for name, flaw in FLAWS.items() if flaw.write and name not in LEARNT_ONLY_BY_GAMING]
    while True:
        occasion = rng.choice(occasions)
        recipient, query = rng.choice(asked[occasion])
        if occasion in OCCASIONS and rng.random() < 0.5:
            recipient = rng.choice(recipients)
            words = [
                re.findall("[\u4e00-\u9fff]+", patterns)
                for patterns in (RECIPIENTS[recipient]["asked"], OCCASIONS[occasion]["asked"])
            ]
            query = rng.choice(ASKING).format(r=rng.choice(words[0]), o=rng.choice(words[1]))
        pool = sentences[occasion]
        text = "".join(rng.sample(pool, min(len(pool), rng.choice([1, 2, 2, 2, 3]))))
        called = RECIPIENTS.get(recipient, {}).get("called", recipient)
        if called and rng.random() < 0.7:
            text = f"{called}，{text}"
        yield query, rng.choice(flawed)(text, rng) if rng.random() < FLAWED else text


def tiny_policy() -> Path:
    """The folder of the tiny model; trained from random weights (about 100 s on 2 cores) unless it is there already."""
    files = ("data/references.jsonl", "data/queries.jsonl", "data/lexicon.json", "prompts/policy.md")
    recipe = (
        STEPS,
        BATCH,
        LEARNING_RATE,
        VOCABULARY,
        HIDDEN,
        LAYERS,
        FLAWED,
        SENTENCES,
        LONGEST,
        ASKING,
        CHAT_TEMPLATE,
        sorted(LEARNT_ONLY_BY_GAMING),
    )
    code = [inspect.getsource(function) for function in (_training_texts, _train_tiny)]
    folder = TINY / digest(recipe, code, *(file_hash(ROOT / name) for name in files))
    if not (folder / "config.json").is_file():
        TINY.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=TINY))
        _train_tiny(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(scratch)
    return folder


def _train_tiny(folder: Path) -> None:
    import torch
    from tqdm import tqdm
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    from common.llm import render

    rng = random.Random(0)
    texts, rows = _training_texts(rng), []
    for _ in range(STEPS * BATCH):
        query, greeting = next(texts)
        prompt = f"<|im_start|>user\n{render('policy', query=query)[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((prompt, f"{greeting}<|im_end|>"))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [p + c for p, c in rows[:4000]], vocab_size=VOCABULARY, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    # Muon learns the sentences in a third of the steps that AdamW needs.
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    bar = tqdm(range(STEPS), desc="training the tiny model (once)", unit="step", file=sys.stderr)
    for step in bar:
        share = max(0.03, 0.5 * (1 + math.cos(math.pi * step / STEPS))) * min(1.0, (step + 1) / 20)
        batch = rows[step * BATCH : (step + 1) * BATCH]
        ids = tokenizer([p + c for p, c in batch], return_tensors="pt", padding=True, padding_side="right").to(device)
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        for row, (prompt, _) in enumerate(batch):
            labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
        with torch.autocast(device, torch.bfloat16):
            loss = model(**ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser_ in (muon, adamw):
            for group in optimiser_.param_groups:
                group["lr"] = LEARNING_RATE * share
            optimiser_.step()
            optimiser_.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print what the thresholds of fluency and occasion rest on: each eighth of the references, by the other seven."""
    references = sorted(read(REFERENCES, Reference), key=lambda r: r.id)
    rng, known = random.Random(0), CharacterModel([r.response for r in references])
    strange: dict[str, list[float]] = {"known": [], "left out": [], "left out, every clause shuffled": []}
    backwards: dict[str, list[float]] = {"left out": [], "left out, one clause reversed": []}
    other: dict[str, list[bool]] = {"its own occasion asked for": [], "another occasion asked for": []}
    for part in range(8):
        rest = [r for n, r in enumerate(references) if n % 8 != part]
        fluency, occasions = CharacterModel([r.response for r in rest]), OccasionModel(rest)
        for reference in references[part::8]:
            text = reference.response
            strange["known"].append(known.strangeness(text))
            strange["left out"].append(fluency.strangeness(text))
            shuffled = "".join(rng.sample(text, len(text)))
            strange["left out, every clause shuffled"].append(fluency.strangeness(shuffled))
            backwards["left out"].append(fluency.backwards(text))
            reversed_ = re.sub("[^，。！？；]{5,}", lambda clause: clause[0][::-1], text, count=1)
            if reversed_ != text:
                backwards["left out, one clause reversed"].append(fluency.backwards(reversed_))
            likeness, elsewhere = occasions.likeness(text), rng.choice(references)
            for name, asked in zip(other, (reference, elsewhere), strict=True):
                kin = kindred(asked.occasion)
                fits = asked is reference or reference.occasion not in kin
                if asked.occasion in OCCASIONS and fits and not _signs_of([asked.occasion], text):
                    other[name].append(occasions.elsewhere(likeness, kin))
    for name, scores in strange.items():
        marks = {f"{q}%": round(sorted(scores)[int(q / 100 * (len(scores) - 1))], 2) for q in (1, 50, 99)}
        print(f"strangeness, {name}: {marks}")
    for name, scores in backwards.items():
        print(f"reads better backwards, {name}: {sum(s > BACKWARDS for s in scores) / len(scores):.1%}")
    for name, found in other.items():
        print(f"no sign of the occasion and more like another, {name}: {sum(found) / len(found):.1%} of {len(found)}")


if __name__ == "__main__":
    main()
