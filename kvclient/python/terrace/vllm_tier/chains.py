"""Where a request's keys stand in their chains, and what of them a node has.

    ReqContext: key ─► token at which it ends ──locate──► hashes of its chain, index in it
    keys asked one by one ──answer──► one lookup from the first to the chain's end, then HIT, MISS or RETRY

Why one lookup: vLLM asks key by key and step by step, a node best answers a chain at once, under one lease. A key
behind what a lookup found may still be there, when vLLM's own tier has what lies between: then it starts a lookup of
its own, `MAX_ASKS` of them per request and group.
Errors: none; whatever cannot be told is a MISS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, get_offload_group_idx

from terrace import Cache

MAX_ASKS = 8
"""Lookups of one request and group that are kept at a time."""


@dataclass(slots=True)
class Ask:
    """One lookup: the blocks `first`..`end` of a chain, of which `count` are there."""

    name: str
    hashes: bytes
    first: int
    end: int
    count: int | None = None
    step: int = -1

    def covers(self, index: int) -> bool:
        return self.first <= index < self.first + (self.count or 0)

    def poll(self, cache: Cache, width: int, step: int) -> int | None:
        """Asks the cache, at most once per step; an answer shrinks when one of its blocks has failed since."""
        if self.step != step:
            self.step, self.count = step, cache.lookup(self.name, self.hashes, width, self.first)
        return self.count


@dataclass(slots=True)
class Group:
    """One request's chain of one KV cache group, and what was asked of it."""

    hashes: bytes = b""
    asks: list[Ask] = field(default_factory=list)
    last: int = -1


@dataclass(slots=True)
class Request:
    """What a tier keeps of a request: its chains, and what must happen before its leases go."""

    name: str
    groups: dict[int, Group] = field(default_factory=dict)
    asked: int = 0
    loads: int = 0
    scheduled: bool = False
    over: bool = False

    def locate(self, context: ReqContext, key: OffloadKey, chunk_tokens: dict[int, int]) -> tuple[Group, bytes, int]:
        """The hashes of the chain, up to `key` at least, and where in it `key` stands.

        vLLM notes the token at which each key of a request ends. A key that ends inside a chunk (the tail of a prompt)
        stands where the full chunk would. A key of no known place is a chain of its own: found again, evicted alone.
        """
        index, width = get_offload_group_idx(key), len(key)
        group = self.groups.setdefault(index, Group())
        tokens, end = chunk_tokens.get(index), context.get_offload_key_position(key)
        if tokens is None or end is None:
            return group, key, 0
        at, tail = (end - 1) // tokens, end % tokens != 0
        if len(group.hashes) < (at if tail else at + 1) * width:
            ends = {
                end: key
                for key, end in context._offload_key_positions.items()
                if end % tokens == 0 and get_offload_group_idx(key) == index
            }
            group.hashes = b"".join(takewhile(bool, (ends.get(i * tokens, b"") for i in range(1, len(ends) + 1))))
        if tail and len(group.hashes) >= at * width:
            return group, group.hashes[: at * width] + key, at
        if group.hashes[at * width : (at + 1) * width] == key:
            return group, group.hashes, at
        return group, key, 0

    def answer(self, cache: Cache, step: int, key: OffloadKey, group: Group, hashes: bytes, index: int) -> LookupResult:
        """Whether a node has `key`. RETRY: the lookup is on its way; nothing here waits."""
        # vLLM scans windowed groups from the end: then one question from the start covers what follows.
        backwards, group.last = group.last == index + 1, index
        width, pending = len(key), False
        for ask in group.asks:
            if not ask.first <= index < ask.end or ask.hashes[index * width : (index + 1) * width] != key:
                continue
            count = ask.poll(cache, width, step)
            if count is None:
                pending = True
            elif ask.covers(index):
                return LookupResult.HIT
            elif index == ask.first + count:
                return LookupResult.MISS
        if pending:
            return LookupResult.RETRY
        if len(group.asks) >= MAX_ASKS:
            return LookupResult.MISS
        first = 0 if backwards and all(ask.first for ask in group.asks) else index
        self.asked += 1
        ask = Ask(f"{self.name}/{self.asked}", hashes, first, len(hashes) // width)
        group.asks.append(ask)
        if ask.poll(cache, width, step) is None:
            return LookupResult.RETRY
        return LookupResult.HIT if ask.covers(index) else LookupResult.MISS

    def release(self, cache: Cache) -> None:
        """Gives leases back once the request was scheduled or is over, but none that a load still reads under."""
        if self.loads or not (self.over or self.scheduled):
            return
        for group in self.groups.values():
            for ask in group.asks:
                cache.forget(ask.name)
            group.asks.clear()
            group.last = -1
