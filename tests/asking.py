"""Questions put to a loopback endpoint through the client, by a clock on which no pause takes time."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint import Served, chat, endpoint, settings

from common import client, failures, throttle
from common.answers import Verdict
from common.client import Client
from common.failures import Unusable
from common.judge import judge_greeting
from common.store import Store

KEY = "sk-do-not-tell-anyone"
GOOD = chat('{"reason": "好 <ok>", "verdict": 1}')
SLOTS = {"query": "祝福妈妈 母亲节", "response": "妈妈，愿你“平安”🎉。", "principles": ["语言通顺", "情感真挚"]}
SAMPLES = [{"sample": n} for n in range(12)]


class Clock:
    """Stands in for the client's clock: it goes on by each pause that is asked for, and no pause is made."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_800_000_000 + self.now


@pytest.fixture(name="clock", autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, sleep = Clock(), asyncio.sleep

    async def nap(seconds: float, *args: object) -> None:
        until = clock.now + seconds  # several that sleep at once sleep the same time
        await sleep(0)
        clock.now = max(clock.now, until)

    for module in (client, failures, throttle):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", nap)
    return clock


@pytest.fixture(name="server")
def loopback_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with endpoint(GOOD) as served:
        yield served


def ask(url: str, run: Path, *questions: dict, step: str = "03", **changed: object) -> list[Verdict]:
    """The verdicts on some questions asked at once; each differs from the usual one, and the settings, as given."""

    async def asking() -> list[Verdict]:
        async with Client(settings(url, run=run, **changed), step) as client:
            slots = [SLOTS | question for question in questions or [{}]]
            return await asyncio.gather(*(client.ask("detector", Verdict, **s) for s in slots))

    return asyncio.run(asking())


def judge(url: str, run: Path, count: int = 1, **changed: object) -> list[Verdict | Unusable]:
    """What the judge says of `count` greetings, asked at once."""

    async def judging() -> list:
        async with Client(settings(url, run=run, **changed), "03") as client:
            asking = (judge_greeting(client, "教师节", f"老师好{n}。", ["通顺"]) for n in range(count))
            return await asyncio.gather(*asking, return_exceptions=True)

    return asyncio.run(judging())


def ledger(run: Path, step: str = "03") -> dict:
    return Store(run / "answers.sqlite", step).ledger("detector")
