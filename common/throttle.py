"""How many requests may be under way, and when none may be sent: one throttle for everything that a client asks."""

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tqdm import tqdm

TELL_EVERY = 60.0  # seconds


class Throttle:
    """`async with throttle.place()`: there are --concurrency at most, half as many after a rate limit or a timeout, and
    slowly more again. A rate limit also holds every request back until the time that the endpoint named.
    """

    GROWTH = 1.05  # of the limit, per second in which answers come

    def __init__(self, most: int):
        self.most = most
        self.limit = float(most)  # a fraction of a place counts once it is whole
        self.under_way = 0
        self.waiting: deque[asyncio.Future] = deque()  # first come, first served
        # By time.monotonic(): when requests may be sent again, when the limit last grew, was halved, and was told of.
        self.not_before = self.last_growth = 0.0
        self.last_halving = self.last_told = -math.inf

    @asynccontextmanager
    async def place(self, first: bool = False) -> AsyncIterator[None]:
        """Wait for a place and hold it; `first` is before all others, for a question that is asked again."""
        if self.waiting or self.under_way >= int(self.limit):
            future = asyncio.get_running_loop().create_future()
            self.waiting.insert(0 if first else len(self.waiting), future)
            await future  # whoever finishes passes the place on, already counted
        else:
            self.under_way += 1
        try:
            while time.monotonic() < self.not_before:  # a loop: the pause may be prolonged meanwhile
                await asyncio.sleep(self.not_before - time.monotonic())
            yield
        finally:
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
        """A request sent at `sent` (by time.monotonic()) met a limit: halve, and hold everything for `wait` seconds.

        Requests sent before the last halving tell nothing new: they do not halve the limit again.
        """
        now = time.monotonic()
        if sent > self.last_halving:
            self.limit, self.last_halving = max(1.0, self.limit / 2), now
        self.not_before = max(self.not_before, now + wait)
        if wait >= 1 and now - self.last_told >= TELL_EVERY:
            self.last_told = now
            tqdm.write(f"rate limit: waiting {wait:.0f} s, then {int(self.limit)} at once", file=sys.stderr)
