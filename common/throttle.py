"""How many requests may be under way."""

import asyncio
import sys
import time
from collections import deque

from tqdm import tqdm


class Throttle:
    """How many requests may be under way: --concurrency at most, half as many after a rate limit, slowly more again.

    A rate limit also holds every request back until the time the endpoint named.
    """

    GROWTH = 1.05  # per second in which answers come

    def __init__(self, most: int):
        self.most, self.limit, self.under_way = most, float(most), 0
        self.not_before = self.grown = 0.0
        self.waiting: deque[asyncio.Future] = deque()

    async def __aenter__(self) -> None:
        if self.waiting or self.under_way >= int(self.limit):
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]  # whoever leaves counts the place as taken
        else:
            self.under_way += 1
        while (pause := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    async def __aexit__(self, *exc) -> None:
        self.under_way -= 1
        while self.waiting and self.under_way < int(self.limit):
            future = self.waiting.popleft()
            if not future.done():
                self.under_way += 1
                future.set_result(None)

    def answered(self) -> None:
        """Let a little more through."""
        now = time.monotonic()
        if self.limit < self.most and now > self.not_before:
            self.limit = min(self.most, self.limit * self.GROWTH ** min(1.0, now - max(self.grown, self.not_before)))
            self.grown = now

    def limited(self, sent: float, wait: float) -> None:
        """A request that left at `sent` met a rate limit: hold everything for `wait` seconds.

        Requests that left before the last pause tell nothing new: they do not halve again.
        """
        now = time.monotonic()
        if sent >= self.not_before:
            self.limit = max(1.0, self.limit / 2)
            if wait >= 1:
                tqdm.write(f"rate limit: waiting {wait:.0f} s, then {int(self.limit)} at once", file=sys.stderr)
        self.not_before = max(self.not_before, now + wait)
