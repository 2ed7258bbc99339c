"""Where a step's time goes: functions are wrapped for a while, and each is charged its own time, callees excluded."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any, Iterator


class Stopwatch:
    """Seconds by part. Parts nest: while an inner part runs, the outer one's clock stands."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._wrapped: list[tuple[Any, str, Any]] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Charge every call of ``owner.name`` to ``part``."""
        plain = getattr(owner, name)
        inner, seconds, clock = self._inner, self.seconds, time.perf_counter
        seconds.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = clock()
            try:
                return plain(*args, **kwargs)
            finally:
                took = clock() - start
                seconds[part] += took - inner.pop()
                inner[-1] += took

        self._wrapped.append((owner, name, owner.__dict__[name] if name in vars(owner) else None))
        setattr(owner, name, timed)

    def unwrap(self) -> None:
        """Put every function back."""
        for owner, name, plain in reversed(self._wrapped):
            setattr(owner, name, plain) if plain is not None else delattr(owner, name)
        self._wrapped.clear()


@contextmanager
def watching(wraps: list[tuple[Any, str, str]]) -> Iterator[Stopwatch]:
    """A stopwatch on (owner, function name, part) triples, for the length of the block."""
    watch = Stopwatch()
    try:
        for owner, name, part in wraps:
            watch.wrap(owner, name, part)
        yield watch
    finally:
        watch.unwrap()
