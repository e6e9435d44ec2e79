"""How many requests may be under way, and when none may be sent: one throttle for everything that a client asks."""

import asyncio
import sys
import time
from collections import deque

from tqdm import tqdm


class Throttle:
    """`async with throttle` waits for a place: there are --concurrency at most, half as many after a rate limit, and
    slowly more again. A rate limit also holds every request back until the time that the endpoint named.
    """

    GROWTH = 1.05  # of the limit, per second in which answers come

    def __init__(self, most: int):
        self.most = most
        self.limit = float(most)  # a fraction of a place counts once it is whole
        self.under_way = 0
        self.waiting: deque[asyncio.Future] = deque()  # first come, first served
        # By time.monotonic(): when requests may be sent again, and when the limit last grew.
        self.not_before = 0.0
        self.last_growth = 0.0

    async def __aenter__(self) -> None:
        if self.waiting or self.under_way >= int(self.limit):
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]  # whoever finishes passes the place on, already counted
        else:
            self.under_way += 1
        while time.monotonic() < self.not_before:  # a loop: the pause may be prolonged meanwhile
            await asyncio.sleep(self.not_before - time.monotonic())

    async def __aexit__(self, *exc) -> None:
        self.under_way -= 1
        while self.waiting and self.under_way < int(self.limit):
            future = self.waiting.popleft()
            if not future.done():  # done: whoever waited was cancelled
                self.under_way += 1
                future.set_result(None)

    def answered(self) -> None:
        """An answer has come: let a little more through, in proportion to the time since the last growth."""
        now = time.monotonic()
        if self.limit < self.most and now > self.not_before:
            # A second at most: a long silence is no sign that the endpoint can take more.
            seconds = min(1.0, now - max(self.last_growth, self.not_before))
            self.limit = min(self.most, self.limit * self.GROWTH**seconds)
            self.last_growth = now

    def limited(self, sent: float, wait: float) -> None:
        """A request sent at `sent` (by time.monotonic()) met a rate limit: hold everything for `wait` seconds.

        Requests sent before the last pause tell nothing new: they do not halve the limit again.
        """
        now = time.monotonic()
        if sent >= self.not_before:
            self.limit = max(1.0, self.limit / 2)
            if wait >= 1:
                tqdm.write(f"rate limit: waiting {wait:.0f} s, then {int(self.limit)} at once", file=sys.stderr)
        self.not_before = max(self.not_before, now + wait)
