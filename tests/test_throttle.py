"""How many requests are under way, and when none may leave."""

import asyncio
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from asking import GOOD, SAMPLES, Clock, ask, loopback_server, quick_clock  # noqa: F401 - two fixtures
from endpoint import Served, status

from common.throttle import Throttle


@pytest.mark.parametrize(
    ("told", "wait"),
    [
        ("7", (7, 8)), ("9999", (60, 61)), ("1e400", (60, 61)), ("nan", (0.4, 2)), ("soon", (0.4, 2)),
        ("-1", (0.4, 2)), ("", (0.4, 2)), (formatdate(1_800_001_009, usegmt=True), (8, 10)),
        (formatdate(4e9, usegmt=True), (60, 61)), (formatdate(0, usegmt=True), (0.4, 2)),
    ],
)  # fmt: skip
def test_a_429_is_waited_out(server: Served, tmp_path: Path, clock: Clock, told: str, wait: tuple) -> None:
    server.replies[:] = [status(429, retry_after=told), GOOD]
    assert ask(server.url, tmp_path)[0].verdict == 1
    assert len(server.asked) == 2 and wait[0] <= clock.now - 1000 <= wait[1]


def test_a_429_holds_everybody_and_halves_what_is_under_way(
    server: Served, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[:] = [GOOD, status(429, retry_after=3), status(429, retry_after=20), GOOD]
    told: list[float] = []
    serve = server.replies[-1]
    server.replies[-1] = lambda request: told.append(clock.now) or serve
    assert len(ask(server.url, tmp_path, *SAMPLES, concurrency=2)) == 12
    assert min(told) >= 1020 and server.most_at_once <= 2
    assert "rate limit: waiting" in capsys.readouterr().err


def test_a_throttle_recovers_and_forgets_nobody(clock: Clock) -> None:
    throttle, most = Throttle(8), []

    async def one() -> None:
        async with throttle.place():
            most.append(throttle.under_way)
            await asyncio.sleep(1)
            throttle.answered()

    async def many(count: int) -> int:
        most.clear()
        await asyncio.gather(*(one() for _ in range(count)))
        return max(most)

    assert asyncio.run(many(40)) == 8
    throttle.limited(sent=clock.now, wait=5)
    throttle.limited(sent=clock.now, wait=5)  # left before the pause: tells nothing new
    assert throttle.limit == 4
    assert asyncio.run(many(4)) == 4 and clock.now >= 1005
    asyncio.run(many(400))
    assert throttle.limit == 8 and throttle.under_way == 0


def test_no_more_requests_are_under_way_than_allowed(server: Served, tmp_path: Path) -> None:
    server.dwell = 0.05
    ask(server.url, tmp_path, *SAMPLES, concurrency=3)
    assert len(server.asked) == 12 and server.most_at_once <= 3


def test_waiting_for_a_limit_is_no_attempt_and_is_told_once_a_minute(
    server: Served, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies[:] = [status(429, retry_after=20)] * 9 + [status(503, retry_after=20), GOOD]
    assert ask(server.url, tmp_path, attempts=1)[0].verdict == 1
    assert clock.now >= 1200 and len(server.asked) == 11
    assert capsys.readouterr().err.count("rate limit") == 4  # at 0, 60, 120 and 180 seconds


def test_a_timeout_halves_what_is_under_way_and_names_the_flag_once(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that answers one after the other: of eight at once the last would wait too long."""
    server.replies[:] = [lambda request: time.sleep(0.15) or GOOD]
    verdicts = ask(server.url, tmp_path, *SAMPLES, concurrency=8, timeout=0.7, attempts=9)
    assert len(verdicts) == 12 and capsys.readouterr().err.count("--concurrency") == 1


def test_a_timeout_holds_nobody_and_halves_once_for_all_that_were_sent_with_it(clock: Clock) -> None:
    throttle, sent = Throttle(64), clock.now
    clock.now += 120
    for _ in range(64):
        throttle.limited(sent, 0)
    assert (throttle.limit, throttle.not_before) == (32, clock.now)
    clock.now += 120
    throttle.limited(clock.now - 119, 0)
    assert throttle.limit == 16
