"""Runs generated Python in a process that can compute and print, and little else.

On Linux (x86_64, aarch64): a seccomp filter refuses sockets, new processes, signals to others,
tracing, and every call that creates, changes or removes a file; resource limits bound processor
time, memory and descriptors; environment and working directory are empty; the process group is
killed at the wall-clock limit; output beyond a bound is cut. Elsewhere only the limits hold.

What it is not: a virtual machine. The code shares our kernel and can read every file that our user
can read (it has no way to send what it read anywhere but into its own output). A hole in the
kernel's other system calls is a hole here. Run hostile models in a container besides.
"""

import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from typing import NamedTuple

MAX_OUTPUT_BYTES = 1 << 16
_START = """
import ctypes, resource, sys
limits, law, code = sys.argv[1:]
for limit in limits.split():
    name, value = map(int, limit.split(":"))
    resource.setrlimit(name, (value, value))
if law:
    lines = bytes.fromhex(law)
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))
    libc, program = ctypes.CDLL(None), Program(len(lines) // 8, lines)
    # No new privileges, then the filter.
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        sys.exit(97)
exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
"""
"""The process confines itself. We do not do it between fork and exec: Python code that runs there
can wait for ever for a lock that one of our threads held at the fork."""
_EACCES = 13
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused by number, per machine; the names say why.
_REFUSED = {
    "x86_64": {
        "socket": 41, "socketpair": 53, "connect": 42, "fork": 57, "vfork": 58, "execve": 59,
        "execveat": 322, "clone3": 435, "kill": 62, "tkill": 200, "tgkill": 234,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
        "pidfd_open": 434, "pidfd_getfd": 438, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "io_uring_setup": 425, "openat2": 437, "creat": 85,
        "unlink": 87, "unlinkat": 263,
        "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84,
        "link": 86, "linkat": 265, "symlink": 88, "symlinkat": 266, "truncate": 76, "chmod": 90,
        "fchmodat": 268, "fchmodat2": 452, "chown": 92, "lchown": 94, "fchownat": 260, "mknod": 133,
        "mknodat": 259, "utimensat": 280, "setxattr": 188, "mount": 165, "umount2": 166,
        "unshare": 272, "setns": 308, "bpf": 321, "keyctl": 250, "setpriority": 141,
        "prlimit64": 302, "setrlimit": 160, "perf_event_open": 298, "shmget": 29, "msgget": 68,
        "memfd_create": 319, "setsid": 112, "setpgid": 109,
    },
    "aarch64": {
        "socket": 198, "socketpair": 199, "connect": 203, "execve": 221, "execveat": 281,
        "clone3": 435, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "io_uring_setup": 425,
        "openat2": 437, "unlinkat": 35, "renameat": 38, "renameat2": 276, "mkdirat": 34,
        "linkat": 37, "symlinkat": 36, "truncate": 45, "fchmodat": 53, "fchmodat2": 452,
        "fchownat": 54, "mknodat": 33, "utimensat": 88, "setxattr": 5, "mount": 40, "umount2": 39,
        "unshare": 97, "setns": 268, "bpf": 280, "keyctl": 219, "setpriority": 140,
        "prlimit64": 261, "setrlimit": 164, "perf_event_open": 241, "shmget": 194, "msgget": 186,
        "memfd_create": 279, "setsid": 157, "setpgid": 154,
    },
}  # fmt: skip
_OPEN = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}
"""open and openat, and which argument holds the flags."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | _EACCES, 0x80000000


class Ran(NamedTuple):
    """What became of a program."""

    ok: bool
    """It ended by itself with exit code 0."""
    stdout: str
    error: str
    """Why not, or the end of its stderr."""


def run_python(code: str, stdin: str = "", *, timeout_s: float = 5.0, memory_mb: int = 512) -> Ran:
    """Run a program and return what it printed.

    Args:
        code: the program.
        stdin: what it reads.
        timeout_s: wall clock and processor time, each.
        memory_mb: address space.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, \
            tempfile.TemporaryFile() as given:  # fmt: skip
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, _limits(timeout_s, memory_mb),
                 _filter(platform.machine()), code],
                stdin=given, stdout=out, stderr=err, cwd="/", env={"LC_ALL": "C.UTF-8"},
                close_fds=True, start_new_session=True,
            )  # fmt: skip
        except (ValueError, OSError) as error:  # a zero byte, or longer than an argument may be
            return Ran(False, "", f"the program cannot be started: {error}")
        try:
            code_ = process.wait(timeout_s)
            ending = "" if code_ == 0 else _ending(code_)
        except subprocess.TimeoutExpired:
            ending = f"took longer than {timeout_s:g} s"
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        stdout, stderr = _head(out), _head(err)
    return Ran(not ending, stdout, ending and f"{ending}\n{stderr[-2000:]}".strip())


def _ending(code: int) -> str:
    return f"died from {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _head(file) -> str:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")


def _limits(timeout_s: float, memory_mb: int) -> str:
    """Resource limits as `number:value`."""
    limits = {
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: 4 * MAX_OUTPUT_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    return " ".join(f"{name}:{value}" for name, value in limits.items())


def _filter(machine: str) -> str:
    """The seccomp program for this machine, in hexadecimal; empty where there is none."""
    if sys.platform != "linux" or machine not in _ARCHES:
        return ""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    # (code, jump if true, jump if false, value); arguments lie at 16 + 8 i.
    lines = [(load, 0, 0, 4), (equal, 1, 0, _ARCHES[machine]), (give, 0, 0, _KILL)]
    lines += [(load, 0, 0, 0), (any_bit, 0, 1, 0x40000000), (give, 0, 0, _KILL)]  # x32 calls
    for number in sorted(set(_REFUSED[machine].values())):
        error = 0x00050000 | 38 if number == _REFUSED[machine]["clone3"] else _REFUSE
        lines += [(equal, 0, 1, number), (give, 0, 0, error)]
    allow, refuse = (give, 0, 0, _ALLOW), (give, 0, 0, _REFUSE)
    for number, argument in _OPEN[machine].items():
        flags = (load, 0, 0, 16 + 8 * argument)
        lines += [(equal, 0, 4, number), flags, (any_bit, 0, 1, _WRITING), refuse, allow]
    flags = (load, 0, 0, 16)
    lines += [(equal, 0, 4, _CLONE[machine]), flags, (any_bit, 1, 0, _CLONE_THREAD), refuse, allow]
    lines.append((give, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *line) for line in lines).hex()
