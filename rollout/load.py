"""How many samples an engine has in flight, from the memory its keys and values take."""

FIRST = 64
"""Samples in flight before anything is known of their lengths."""
FULL = 0.9
"""Share of the KV memory above which nothing is added: samples in flight still grow."""
DECREASE = 0.85
"""Of what was running when samples were preempted."""
INCREASES = 16
"""So many generations of samples lead from nothing to the most."""


class InFlight:
    """Additive increase, multiplicative decrease.

    A preempted sample loses its keys and computes them again, so an engine with too many samples
    does the same work over and over, and one with too few leaves memory idle. Where the balance is
    depends on lengths that are not known before: it is found by trying, and followed as they
    change. The clock is finished samples, because young ones say nothing of what they will take:
    one more for each of them until the memory was full once, then a fixed number for each
    generation, never more than one for each. Engines that report neither memory nor preemptions
    (the native one without `rollout.kv_memory_mb`: its rows are its memory) reach the most after
    one generation. Trace, at most 128:

        start                                                                      limit 64
        observe(kv_share=0.5, preemptions=0, running=64, queued=0, finished=10)    limit 74
        observe(kv_share=1.0, preemptions=3, running=70, queued=4, finished=20)    limit 59
        observe(kv_share=1.0, preemptions=4, running=57, queued=5, finished=32)    limit 59
        observe(kv_share=0.8, preemptions=4, running=59, queued=0, finished=52)    limit 61

    59 is 0.85 x 70, and stays: 62 in the engine are to become 59 first.

    Source: Chiu and Jain 1989, as in TCP; the decrease acts on what ran, not on the limit.
    """

    def __init__(self, most: int) -> None:
        """Begin at `most` or `FIRST`, and never allow more than `most`."""
        self._most, self._limit = most, float(min(most, FIRST))
        self._preemptions = self._finished = 0
        self._was_full = self._falling = False

    @property
    def limit(self) -> int:
        """Samples that may be in the engine; at least 1."""
        return int(self._limit)

    def observe(
        self, *, kv_share: float, preemptions: int, running: int, queued: int, finished: int
    ) -> None:
        """Follow what the engine reports.

        Args:
            kv_share: of the KV memory that is in use.
            preemptions: since the engine's start.
            running: samples that hold keys.
            queued: those in the engine that hold none, preempted ones among them.
            finished: samples, since the start.
        """
        preempted, done = preemptions > self._preemptions, finished - self._finished
        self._preemptions, self._finished = preemptions, finished
        self._falling = self._falling and running + queued > self._limit
        self._was_full = self._was_full or preempted or kv_share >= FULL
        if preempted and not self._falling:
            self._limit = max(1.0, DECREASE * min(running, self._limit))
            self._falling = True
        elif not preempted and kv_share < FULL and not self._falling:
            each = min(1.0, self._most / INCREASES / self._limit) if self._was_full else 1.0
            self._limit = min(self._most, self._limit + each * done)
