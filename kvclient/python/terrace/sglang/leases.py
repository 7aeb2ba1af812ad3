"""Leases between `batch_exists` and the reads that follow it.

    exists ──► kept under each page it found ──► read of the last, `hold` seconds, or `MAX_HELD` newer ones ──► gone

Why: SGLang asks, queues the prefetch, and reads later in batches of its own; a page that was named must still be there.
Why the ends: a prefetch may be revoked without a word, and what is leased is memory that nobody else can have.
Units: seconds of `time.monotonic`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from terrace.sglang.pages import WIDTH, Pool

MAX_HELD = 256
"""Leases at a time; the oldest goes first."""


class Leases:
    """Which lookups of a pool's cache are still leased, by the pages they found."""

    def __init__(self, hold: float) -> None:
        self.hold = hold
        self.held: OrderedDict[str, tuple[float, Pool, bytes]] = OrderedDict()
        self.holder: dict[tuple[int, bytes], str] = {}
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.sweeper = threading.Thread(target=self._sweep, name="terrace-leases", daemon=True)
        self.sweeper.start()

    def keep(self, request: str, pool: Pool, hashes: bytes) -> None:
        """The lookup `request` found these pages of `pool`."""
        with self.lock:
            self.held[request] = (time.monotonic() + self.hold, pool, hashes)
            self.holder.update((slot, request) for slot in slots(pool, hashes))
        self._let_go()

    def of(self, pool: Pool, page: bytes) -> str | None:
        """The lookup under whose lease a page is read."""
        with self.lock:
            return self.holder.get((id(pool), page))

    def read(self, request: str | None, page: bytes) -> None:
        """`page` was read: the last of what `request` found ends its lease."""
        with self.lock:
            over = request is not None and request in self.held and self.held[request][2].endswith(page)
        if over and request is not None:
            self._forget(request)

    def _forget(self, request: str) -> None:
        with self.lock:
            if request not in self.held:
                return
            _, pool, hashes = self.held.pop(request)
            for slot in slots(pool, hashes):
                if self.holder.get(slot) == request:
                    del self.holder[slot]
        pool.cache.forget(request)

    def _let_go(self) -> None:
        while True:
            with self.lock:
                oldest = next(iter(self.held), None)
                late = oldest is not None and self.held[oldest][0] <= time.monotonic()
                if oldest is None or not (late or len(self.held) > MAX_HELD):
                    return
            self._forget(oldest)

    def _sweep(self) -> None:
        while not self.closed.wait(max(0.05, self.hold / 4)):
            self._let_go()

    def close(self) -> None:
        self.closed.set()
        self.sweeper.join(timeout=5)


def slots(pool: Pool, hashes: bytes) -> list[tuple[int, bytes]]:
    return [(id(pool), hashes[at : at + WIDTH]) for at in range(0, len(hashes), WIDTH)]
