"""The one tree of errors, and who deals with which.

| boundary         | example                            | what happens                             |
|------------------|------------------------------------|------------------------------------------|
| the user's input | unknown key, missing column        | `ConfigError`: exit 2, nothing starts    |
| one sample       | a reward raised, a prompt too long | data: recorded on it, the run goes on    |
| one request      | unknown attempt, off-path version  | `Refused`: the caller gets the reason    |
| stored bytes     | a torn segment, a digest mismatch  | `CorruptData`: an older copy is used     |
| the disk         | no space left                      | `DiskFull`: the run ends, `resume`       |
| a process        | the buffer does not answer         | `PeerLost`: it ends, exit 1, `resume`    |
| our own mistake  | an impossible state                | `AssertionError`: a crash, never caught  |

Every class takes one message, so that instances survive pickling without a `__reduce__`.
"""


class SlipstreamError(Exception):
    """Base of every error this project raises on purpose; the message says what to do."""

    exit_code = 1


class ConfigError(SlipstreamError):
    """What the user asked for is impossible: names the key or file, the reason and the remedy."""

    exit_code = 2


class Refused(SlipstreamError):
    """The buffer service refused one request; nothing changed."""


class CorruptData(SlipstreamError):
    """Bytes on disk or on the wire are not what was written."""


class WireError(CorruptData):
    """A frame does not follow the schema: truncated, oversized, wrong types or another version."""


class DiskFull(SlipstreamError):
    """A file of the run cannot grow; what was acknowledged is kept."""


class PeerLost(SlipstreamError):
    """A process we depend on did not answer within its deadline."""


class TrainingFailed(SlipstreamError):
    """The run cannot go on: non-finite loss, rewards failing above the allowed rate, no signal."""
