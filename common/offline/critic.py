"""The rule-based critic in its ten roles, behind the same client as a remote model.

It gets the same rendered prompt as a model, obeys the same schema and returns the same wire format. As judge under
principles it uses, of all that it can measure, only what the principles in its prompt speak of.

Each role takes the rules listed in its prompt and the data below them, and returns what its schema asks for.
"""

import json
import random
import re
from collections import Counter
from functools import lru_cache

from common import characters, lexicon, signs
from common.characters import REFERENCES
from common.lexicon import IMAGES, LEXICON_FILE, STOCK, WARM, clauses, occasions_in, signs_of
from common.offline import flaws
from common.offline.flaws import FLAWS, flaws_of, flaws_spoken_of
from common.run_folder import digest, file_hash

NO_WEAKNESS = "没有找到明显的毛病"
# What the critic notices without a debate.
AT_FIRST_GLANCE = {"truncated", "foreign", "placeholder", "broken", "cliche", "repetition", "wrong_recipient", "echo"}
# What leaves nothing to grade.
WORTHLESS = {"advertising", "alternatives", "broken", "echo", "flattery", "form", "meta", "no_greeting", "padded"}
WORTHLESS |= {"foreign", "placeholder", "repetition", "request", "truncated"}
# Without examples to compare with, what belongs to an occasion is anybody's guess.
NEEDS_EXAMPLES = {"wrong_occasion", "register", "style_ignored"}


def grades(query: str, response: str) -> dict[str, int]:
    """The five grades of the rubric (1-3), from the same measurements; no character is counted, only clauses."""
    hints = flaws_of(query, response)
    clear = {name for name, sure in hints.items() if sure == 2}
    misdirected = bool(clear & {"wrong_occasion", "wrong_recipient"})
    scores = dict.fromkeys(("language", "creativity", "emotion", "culture", "richness"), 1)
    if clear & WORTHLESS:
        return scores
    scores["language"] = 2 if hints.keys() & {"broken", "repetition"} else 3
    if not misdirected and "cliche" not in hints:
        scores["creativity"] = min(3, 1 + len(set(response) & IMAGES) // 2)
    if not misdirected and not clear & {"offensive", "register"}:
        scores["emotion"] = 1 + bool(WARM.search(response)) + bool(re.search("[你您咱]", response))
        scores["culture"] = 1 if clear & {"taboo", "style_ignored"} else 3
    original = set()
    for clause in clauses(response):
        if len(clause) >= 3 and not any(phrase in clause for phrase in STOCK):
            original.add(clause)
    scores["richness"] = min(3, max(1, len(original)))
    return scores


def _describe(sureness: dict[str, int]) -> list[str]:
    """Flaws in words, in the order of their names."""
    degrees = {2: "明显", 1: "疑似"}
    return [f"{degrees[sure]}：{FLAWS[name].rule}" for name, sure in sorted(sureness.items())]


# ---- the five agents of step 01 (the first is retrieval) ------------------------------------------------------------


def positive(rules: list[str], data: dict) -> dict:
    query, response = data["query"], data["response"]
    strengths = []
    images = sorted(set(response) & IMAGES)
    if len(images) >= 2:
        strengths.append("有具体的意象：" + "、".join(images[:4]))
    if signs_of(occasions_in(query), response):
        strengths.append("切合场合：" + "、".join(sorted(occasions_in(query))))
    if "您" in response or "你" in response:
        strengths.append("直接对人说话，有称呼")
    warm = WARM.search(response)
    if warm:
        strengths.append("语气温暖：" + warm[0])
    if characters.character_model().strangeness(response) <= characters.ODD:
        strengths.append("读来顺口")
    return {"points": strengths or ["没有找到明显的长处"]}


def negative(rules: list[str], data: dict) -> dict:
    sureness = flaws_of(data["query"], data["response"])
    if not data["examples"]:
        sureness = {name: sure for name, sure in sureness.items() if name not in NEEDS_EXAMPLES}
    return {"points": _describe(sureness) or [NO_WEAKNESS]}


def judge(rules: list[str], data: dict) -> dict:
    """Weighs strengths and weaknesses by number: that is what the Reflect agent is there to correct."""
    weaknesses = [point for point in data["negative"] if point != NO_WEAKNESS]
    if not weaknesses:
        sureness = flaws_of(data["query"], data["response"])
        weaknesses = _describe({name: sure for name, sure in sureness.items() if name in AT_FIRST_GLANCE})
    strengths = data["positive"]
    reason = f"长处{len(strengths)}处，毛病{len(weaknesses)}处。" + "；".join(weaknesses)
    return {"reason": reason, "verdict": int(len(strengths) >= 2 * len(weaknesses))}


def reflect(rules: list[str], data: dict) -> dict:
    weaknesses = data["negative"] + data["judge"]["reason"].split("；")
    clear = [point for point in weaknesses if "明显：" in point]
    if data["judge"]["verdict"] == 1 and clear:
        return {"reason": "裁决漏掉了" + clear[0], "verdict": 0}
    if data["judge"]["verdict"] == 0 and not clear:
        return {"reason": "只有无关紧要的小节，推翻原裁决", "verdict": 1}
    return {"reason": "理由与裁决一致，维持原裁决", "verdict": data["judge"]["verdict"]}


# ---- the judge under principles, the rubric, pairs ------------------------------------------------------------------


def _clear_flaws(names: list[str], data: dict) -> list[str]:
    """Those of the named flaws that the greeting clearly has."""
    return [name for name in names if FLAWS[name].detect(data["query"], data["response"]) == 2]


def detector(rules: list[str], data: dict) -> dict:
    clear = _clear_flaws(flaws_spoken_of(rules), data)
    if clear:
        return {"reason": "违反准则：" + "；".join(FLAWS[name].rule for name in clear), "verdict": 0}
    return {"reason": "逐条核对，没有违反准则之处", "verdict": 1}


def rubric(rules: list[str], data: dict) -> dict:
    weaknesses = _describe(flaws_of(data["query"], data["response"]))
    return {"reason": "；".join(weaknesses or [NO_WEAKNESS]), **grades(data["query"], data["response"])}


def pairwise(rules: list[str], data: dict) -> dict:
    """The higher sum of the five grades; where they are equal the first, as judges do: both orders must be asked."""
    first = sum(grades(data["query"], data["A"]).values())
    second = sum(grades(data["query"], data["B"]).values())
    return {"reason": f"五项合计，甲{first}分，乙{second}分", "better": "A" if first >= second else "B"}


# ---- the adversarial loop of step 03 --------------------------------------------------------------------------------


def flaws_of_strategy(text: str) -> list[str]:
    """The flaws whose strategy a text names."""
    return [name for name, flaw in FLAWS.items() if flaw.strategy in text]


def generator(rules: list[str], data: dict) -> dict:
    """Writes the flaw that the strategy names into an example; if it knows none in it, it cuts the example short."""
    rng = random.Random(digest(rules, data))
    example = rng.choice(data["examples"])["response"]
    writable = [name for name in flaws_of_strategy(data["strategy"]) if FLAWS[name].write]
    flaw = FLAWS[writable[0] if writable else "truncated"]
    return {"response": flaw.write(example, rng), "flaw": flaw.rule}


def reflector(rules: list[str], data: dict) -> dict:
    """The lesson of a mistaken verdict: which rule is missing, or which is too strict."""
    known = flaws_spoken_of(rules)
    if data["expected"] == 0:
        sureness = flaws_of(data["query"], data["response"])
        missing = [name for name in sureness if name not in known]
        if not missing:
            return {"lesson": "没有找到能推广的原因，准则不变"}
        worst = max(missing, key=lambda name: (sureness[name], name))
        return {"lesson": "补上：" + FLAWS[worst].rule}
    too_strict = _clear_flaws(known, data)
    if "short" in too_strict:  # a rule against short greetings is meant against empty ones
        return {"lesson": f"过严，删去：{FLAWS['short'].rule}。补上：{FLAWS['empty'].rule}"}
    return {"lesson": "过严，删去：" + FLAWS[too_strict[0]].rule if too_strict else "准则不变"}


def _understand(kind: str, text: str) -> list[str]:
    """The flaws that a rule, a strategy or a piece of feedback speaks of."""
    return flaws_of_strategy(text) if kind == "策略" else flaws_spoken_of([text])


def _count_votes(kind: str, feedback: list[str]) -> Counter[str]:
    """Flaw -> how often the feedback speaks for it, less how often against it."""
    votes: Counter[str] = Counter()
    for item in feedback:
        # "过严，删去：A。补上：B" speaks against A and for B; what does not begin so speaks for all that it names.
        against, towards = "", item
        if re.match("过严|被识破", item):
            against, _, towards = item.partition("补上：")
        repeated = re.search(r"（(\d+) 次）$", item)
        times = int(repeated[1]) if repeated else 1
        for name in _understand(kind, towards):
            votes[name] += times
        for name in _understand(kind, against):
            votes[name] -= times
    return votes


def optimiser(rules: list[str], data: dict) -> dict:
    """Rewrites a list of rules after feedback, one line for each family of flaws.

    Principles: adds what the feedback finds missing, drops what it calls too strict twice or more. Strategies: drops
    what was caught more often than it fooled, and tries flaws that were not tried.
    """
    kind = data["kind"]
    names: set[str] = set()
    foreign_rules = []  # what the critic does not understand it leaves alone
    for rule in data["rules"]:
        names.update(_understand(kind, rule))
        if not _understand(kind, rule):
            foreign_rules.append(rule)
    if kind == "策略":
        untried = [name for name, flaw in FLAWS.items() if flaw.write and name not in names]
        names.update(untried[:3])
    for name, count in _count_votes(kind, data["feedback"]).items():
        if count > 0:
            names.add(name)
        elif count < (0 if kind == "策略" else -1):
            names.discard(name)

    families: dict[int, list[str]] = {}
    for name, flaw in FLAWS.items():
        if name in names:
            families.setdefault(flaw.family, []).append(flaw.strategy if kind == "策略" else flaw.rule)
    lines = ["；".join(families[family]) + "。" for family in sorted(families)]
    return {"rules": (lines + foreign_rules)[:10] or data["rules"]}


SPEAKERS = (positive, negative, judge, reflect, detector, rubric, pairwise, generator, reflector, optimiser)
ROLES = {speaker.__name__: speaker for speaker in SPEAKERS}


def answer(role: str, messages: list[dict]) -> dict:
    """The critic's answer to a rendered prompt: it reads the numbered rules in it and the JSON inside <data>."""
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    listed = re.search(r"(?:准则|策略)：\n(.*?)\n\n", system + "\n\n", flags=re.S)
    rules = re.findall(r"^\d+\. (.*)$", listed[1], flags=re.M) if listed else []
    data = json.loads(re.search(r"<data>(.*?)</data>", messages[-1]["content"], flags=re.S)[1])
    return ROLES[role](rules, data)


@lru_cache
def critic_name() -> str:
    """Name and version: answers of an edited critic, or of other references, are not taken from the cache."""
    files = (__file__, *(part.__file__ for part in (flaws, lexicon, signs, characters)), REFERENCES, LEXICON_FILE)
    return f"rule-based-critic-{digest(*map(file_hash, files))[:8]}"


def transport():
    """An httpx transport that answers chat completions with the critic: for openai.AsyncOpenAI, it is an endpoint."""
    import httpx2

    def respond(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        role = body["response_format"]["json_schema"]["name"]
        text = json.dumps(answer(role, body["messages"]), ensure_ascii=False)
        prompt = sum(len(message["content"]) for message in body["messages"])  # characters stand for tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": len(text), "total_tokens": prompt + len(text)}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        completion = {"id": "offline", "object": "chat.completion", "created": 0, "model": body["model"]}
        return httpx2.Response(200, json=completion | {"choices": [choice], "usage": usage})

    return httpx2.MockTransport(respond)
