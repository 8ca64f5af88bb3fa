"""A disk that can be filled and slowed down, and a clock that jumps.

The disk is a file mounted as one; how fast it is, a control group of the kernel limits. Neither
touches the machine's own disk or clock. Both need rights that a sandbox may refuse.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SIZE_MB = 600
SLOW_BYTES_PER_S = 300_000
"""A checkpoint of the tiny policy takes ten seconds at that rate, and every sync is felt."""
THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
FILL_BYTES = (8 << 20, 1 << 20, 1 << 16, 1 << 12)
"""Pieces that a disk is filled with, largest first, down to one block."""

JUMP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <stdlib.h>
static long jump(void) {
    const char *file = getenv("JUMP_FILE");
    return file && !access(file, F_OK) ? 86400 : 0;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += jump();
    return code;
}
time_t time(time_t *out) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *zone) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000;
    return 0;
}
"""


class Refused(Exception):
    """The sandbox's own words."""


class Disk:
    """A mounted file; `place` is its folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._filler = place / "filler"
        device = place.stat().st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        self.refused = ""
        """Why it can be filled, but not slowed down."""
        try:
            self.mend()  # of a device of this number before
        except Refused as error:
            self.refused = str(error)

    def fill(self) -> None:
        """Leave no block free."""
        size = 0
        with self._filler.open("wb") as file:
            for piece in FILL_BYTES:
                with contextlib.suppress(OSError):  # no space left: then a smaller piece
                    while True:
                        os.posix_fallocate(file.fileno(), size, piece)
                        size += piece

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def slow(self) -> None:
        """Write no faster than `SLOW_BYTES_PER_S`.

        Raises:
            Refused: the sandbox lets nobody slow it down.
        """
        self._limit(SLOW_BYTES_PER_S)

    def seconds_of(self, num_bytes: int) -> float:
        """How long it takes until so many bytes are safely written."""
        began_s, probe = time.monotonic(), self.place / "probe"
        with probe.open("wb") as file:
            file.write(os.urandom(num_bytes))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        return time.monotonic() - began_s

    def mend(self) -> None:
        """As fast as ever."""
        self._limit(0)

    def _limit(self, bytes_per_s: int) -> None:
        try:
            THROTTLE.write_text(f"{self._device} {bytes_per_s}\n")
        except OSError as error:
            raise Refused(f"{THROTTLE}: {error}") from None


@contextlib.contextmanager
def limited_disk(folder: Path) -> Iterator[Disk]:
    """A disk of its own, gone at the end.

    Raises:
        Refused: the sandbox lets nobody mount one.
    """
    image, place = folder / "disk.img", folder / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE_MB << 20)
    ask("mkfs.ext4", "-q", "-m", "0", str(image))
    ask("mount", "-o", "loop", str(image), str(place))
    try:
        disk = Disk(place)
        try:
            yield disk
        finally:
            with contextlib.suppress(Refused):
                disk.mend()  # the rule would outlive the device, whose number is used again
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        image.unlink()


def jumping_clock(folder: Path) -> tuple[dict[str, str], Path]:
    """What a process needs in its environment, and the file whose presence puts its wall clock a
    day ahead.

    Raises:
        Refused: there is no C compiler.
    """
    source, library, ahead = folder / "jump.c", folder / "jump.so", folder / "ahead"
    source.write_text(JUMP)
    ask("cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return {"LD_PRELOAD": str(library), "JUMP_FILE": str(ahead)}, ahead


def ask(*command: str) -> None:
    """Run a command.

    Raises:
        Refused: it is not there, or failed; with its words.
    """
    if shutil.which(command[0]) is None:
        raise Refused(f"{command[0]}: not found")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
