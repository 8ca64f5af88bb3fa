"""A second network on this machine, joined to the first by a cable that can be cut."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from .disks import ask


class Link:
    """A namespace of the network, and the way to it; packets of a cut one are lost without a word.

    here -- cable -- there      the addresses on the two sides
    """

    def __init__(self) -> None:
        """Name it; `joined` makes it."""
        number = os.getpid() % 60_000
        self.name, self._ends = f"slip{number}", (f"sliph{number}", f"slipt{number}")
        self._subnet = f"10.213.{number % 250}"

    @property
    def here(self) -> str:
        """This side's address."""
        return f"{self._subnet}.1"

    @property
    def there(self) -> str:
        """The other side's."""
        return f"{self._subnet}.2"

    def command(self, *command: str) -> list[str]:
        """What runs a command on the other side."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        """Lose every packet, in both directions: a queue that has room for none."""
        for place, end in zip(self._sides, self._ends, strict=True):
            ask(*place, "tc", "qdisc", "replace", "dev", end, "root", "pfifo", "limit", "0")

    def mend(self) -> None:
        """Let packets through."""
        for place, end in zip(self._sides, self._ends, strict=True):
            ask(*place, "tc", "qdisc", "del", "dev", end, "root")

    def has(self, pid: int) -> bool:
        """Whether a process is on the other side."""
        theirs = os.stat(f"/proc/{pid}/ns/net")
        return os.path.samestat(theirs, os.stat(f"/run/netns/{self.name}"))

    @property
    def _sides(self) -> tuple[list[str], list[str]]:
        return [], self.command()

    def _make(self) -> None:
        near, far = self._ends
        ask("ip", "netns", "add", self.name)
        ask("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        ask("ip", "link", "set", far, "netns", self.name)
        ask("ip", "addr", "add", f"{self.here}/24", "dev", near)
        ask("ip", "link", "set", near, "up")
        for words in (("addr", "add", f"{self.there}/24", "dev", far), ("link", "set", far, "up"),
                      ("link", "set", "lo", "up")):  # fmt: skip
            ask(*self.command("ip", *words))

    def _remove(self) -> None:
        for words in (("link", "del", self._ends[0]), ("netns", "del", self.name)):
            subprocess.run(["ip", *words], capture_output=True, check=False)


@contextlib.contextmanager
def joined() -> Iterator[Link]:
    """Two networks, one again at the end.

    Raises:
        Refused: the sandbox gives nobody a network of its own.
    """
    link = Link()
    try:
        link._make()
        yield link
    finally:
        link._remove()
