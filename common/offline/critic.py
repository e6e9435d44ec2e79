"""The rule-based critic in its ten roles, behind the same client as a remote model."""

import json
import random
import re
from collections import Counter
from functools import lru_cache

from common.offline import flaws
from common.offline.flaws import FLAWS, REFERENCES, flaws_of, flaws_spoken_of, grades, praise
from common.run_folder import ROOT, digest, file_hash

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
    known = [file_hash(path) for path in (__file__, flaws.__file__, REFERENCES, ROOT / "data" / "lexicon.json")]
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
