"""Who waits for what, since when and for how long, in words for people.

The buffer service shows the requests that it has parked, and the step that waits for its batch, in
`Stats.waits`; a client puts the words into its error when the service is gone. Example of a line:
"learner waits 12.1 s of 600 s for the batch of step 3: 30 of 32 groups READY; ...".
"""

from .records import Record


class Wait(Record, frozen=True):
    """One wait that has not ended; ending it in time is its owner's duty."""

    owner: str
    what: str
    """Naming the process that has to deliver."""
    since_s: float
    """`time.monotonic()` seconds."""
    deadline_s: float
    """Seconds after `since_s` at which the owner stops waiting."""

    def describe(self, now: float) -> str:
        """Say it in words; `overdue` marks a wait past its deadline."""
        waited = now - self.since_s
        overdue = " (overdue)" if waited > self.deadline_s else ""
        return (
            f"{self.owner} waits {waited:.1f} s of {self.deadline_s:g} s for {self.what}{overdue}"
        )
