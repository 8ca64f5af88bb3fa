"""The requests that wait, so that a turn asks again only those that it may have answered.

A fleet parks thousands: each engine waits for a version, for work and for evaluations. Asking all
of them in every turn would cost more than the work itself.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from .messages import Request
from .waits import Wait

Address = tuple[bytes, int]
"""(client identity, request number)."""


@dataclass(slots=True)
class Parked:
    """A request that waits."""

    request: Request
    wait: Wait

    @property
    def ends_s(self) -> float:
        """When its patience ends."""
        return self.wait.since_s + self.wait.deadline_s


class Parking:
    """Parked requests by kind, each kind in the order in which they came."""

    def __init__(self) -> None:
        self._all: dict[Address, Parked] = {}
        self._kinds: dict[type, dict[Address, Parked]] = {}
        self._ends: list[tuple[float, Address]] = []
        """Heap; entries of requests that were answered are skipped."""

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, address: Address) -> bool:
        return address in self._all

    def put(self, address: Address, parked: Parked) -> None:
        """Park a request."""
        self._all[address] = parked
        self._kinds.setdefault(type(parked.request), {})[address] = parked
        heapq.heappush(self._ends, (parked.ends_s, address))

    def remove(self, address: Address) -> None:
        """It is answered."""
        parked = self._all.pop(address)
        del self._kinds[type(parked.request)][address]

    def values(self) -> Iterable[Parked]:
        """All of them."""
        return self._all.values()

    def of(self, kinds: Iterable[type]) -> list[tuple[Address, Parked]]:
        """Those of some kinds, first come first."""
        return [pair for kind in kinds for pair in self._kinds.get(kind, {}).items()]

    def due(self, now: float) -> list[tuple[Address, Parked]]:
        """Those whose patience has ended; each is told once."""
        found = []
        while self._ends and self._ends[0][0] <= now:
            _, address = heapq.heappop(self._ends)
            parked = self._all.get(address)
            if parked is not None and parked.ends_s <= now:
                found.append((address, parked))
        return found
