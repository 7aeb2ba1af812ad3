"""What a connector says in its engine's log, and what it answers where an exception would end the engine's thread."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from terrace._terrace import Cache

MAX_KINDS = 1000
"""Kinds of trouble that are told; texts with numbers in them are kinds of their own."""


class Teller:
    """A connector's lines in the log of its engine."""

    def __init__(self, logger: logging.Logger, name: str = "Terrace") -> None:
        self.logger, self.name = logger, name
        self.told: set[str] = set()

    def news(self, cache: Cache) -> None:
        """Whether the node was found or lost since the last call, and how it is reached."""
        if news := cache.news():
            self.logger.log(logging.INFO if news[0] else logging.WARNING, "%s %s", self.name, news[1])

    def difference(self, cache: Cache) -> None:
        """One line about what keeps an engine from those before it, for a half that tells no other news.

        The node says it to the first that opens the namespace, and that may be any process of an engine.
        """
        if cache.state() == "ready" and (differs := cache.difference()):
            self.trouble(f"no prefix is shared with those who came before: {differs}")

    def trouble(self, what: str) -> None:
        """One line for each kind of trouble, not one per block."""
        if what not in self.told and len(self.told) < MAX_KINDS:
            self.told.add(what)
            self.logger.warning("%s: %s", self.name, what)


class Telling(Protocol):
    """Whatever has a teller."""

    teller: Teller


F = TypeVar("F", bound=Callable[..., Any])


def answers(otherwise: Callable[..., Any]) -> Callable[[F], F]:
    """A method whose failure is an answer, `otherwise(*args)`, and a line in the log."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def call(self: Telling, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                self.teller.trouble(f"{method.__name__}: {error!r}")
                return otherwise(*args, *kwargs.values())

        return call  # type: ignore[return-value]

    return wrap
