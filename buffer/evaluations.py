"""Held-out samples: handed out, collected and forgotten, outside the states, the law and the audit.

In memory only: an evaluation that a crash interrupts is scheduled again by the feeder. Each job is
pinned to one version, whose weights the mailbox keeps until the job is complete.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from .errors import Refused
from .mailbox import Mailbox
from .messages import EvaluationClaim, EvaluationResults, FinishEvaluation, PutEvaluation
from .records import Prompt, WeightsManifest

EVALUATION_SAMPLES_PER_WORKER = 64
"""Outstanding at one worker: keeps its second engine busy, and leaves some for the others."""
MAX_SAMPLES = 1 << 20
"""Of one job."""
KEPT_JOBS = 8
"""Complete jobs whose results can still be asked for."""

Place = tuple[int, int]
"""(uid, index)."""


@dataclass(slots=True)
class Job:
    """One evaluation."""

    request: PutEvaluation
    manifest: WeightsManifest
    prompts: dict[int, Prompt]
    waiting: OrderedDict[Place, None] = field(default_factory=OrderedDict)
    leased: dict[Place, tuple[str, str]] = field(default_factory=dict)
    """Sample -> (worker, claim request)."""
    results: dict[Place, FinishEvaluation] = field(default_factory=dict)

    def holders(self) -> list[str]:
        """The worker of each sample in flight."""
        return [worker for worker, _ in self.leased.values()]

    @property
    def complete(self) -> bool:
        """Whether every sample has a result."""
        return not self.waiting and not self.leased

    def __str__(self) -> str:
        total = len(self.waiting) + len(self.leased) + len(self.results)
        return f"version {self.request.version}: {len(self.results)} of {total} samples"


class Evaluations:
    """All jobs of the run, oldest first."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def put(self, request: PutEvaluation) -> None:
        """Start a job; a repeat changes nothing.

        Raises:
            Refused: its version is not held any more, or two prompts have one uid.
        """
        if request.job_id in self._jobs:
            return
        prompts = {prompt.uid: prompt for prompt in request.prompts}
        if len(prompts) != len(request.prompts):
            raise Refused(f"evaluation {request.job_id}: two prompts have the same uid")
        if not 0 <= len(prompts) * request.samples_per_prompt <= MAX_SAMPLES:
            raise Refused(f"evaluation {request.job_id}: over {MAX_SAMPLES} samples")
        manifest = self._mailbox.pin(request.job_id, request.version)
        job = Job(request=request, manifest=manifest, prompts=prompts)
        for uid in prompts:
            job.waiting.update(dict.fromkeys((uid, i) for i in range(request.samples_per_prompt)))
        self._jobs[request.job_id] = job
        self._close(job)

    def claim(self, worker: str, request_id: str) -> tuple[EvaluationClaim, ...]:
        """Lease samples of the oldest incomplete job to a worker, up to its allowance."""
        held = sum(job.holders().count(worker) for job in self._jobs.values())
        room = EVALUATION_SAMPLES_PER_WORKER - held
        job = next((job for job in self._jobs.values() if job.waiting), None)
        if job is None or room <= 0:
            return ()
        places = list(job.waiting)[:room]
        for place in places:
            del job.waiting[place]
            job.leased[place] = (worker, request_id)
        return _claims(job, places)

    def granted(self, worker: str, request_id: str) -> tuple[EvaluationClaim, ...]:
        """What a claim request was given and its worker still holds: the answer to its repeat.

        A repeat that crossed its answer comes before anything is handed in, so nothing is missing.
        """
        held = (worker, request_id)
        claims: list[EvaluationClaim] = []
        for job in self._jobs.values():
            claims += _claims(job, [place for place, lease in job.leased.items() if lease == held])
        return tuple(claims)

    def finish(self, result: FinishEvaluation) -> None:
        """Accept a result; the first one counts.

        Raises:
            Refused: no such job or sample.
        """
        job, place = self._find(result.job_id), (result.uid, result.index)
        if place not in job.waiting and place not in job.leased and place not in job.results:
            raise Refused(f"evaluation {result.job_id} has no sample {place}")
        job.waiting.pop(place, None)
        job.leased.pop(place, None)
        job.results.setdefault(place, result)
        self._close(job)

    def results(self, job_id: str) -> EvaluationResults | str:
        """The results, or in words what is missing.

        Raises:
            Refused: no such job.
        """
        job = self._find(job_id)
        if not job.complete:
            workers = ", ".join(sorted(set(job.holders()))) or "no worker"
            return f"{job}; {len(job.leased)} in flight at {workers}"
        return EvaluationResults(
            job_id=job_id,
            version=job.manifest.version,
            results=tuple(job.results[place] for place in sorted(job.results)),
        )

    def expire_worker(self, worker: str) -> None:
        """Put back what a silent worker holds."""
        for job in self._jobs.values():
            for place in [place for place, (name, _) in job.leased.items() if name == worker]:
                del job.leased[place]
                job.waiting[place] = None

    @property
    def waiting(self) -> bool:
        """Whether there are samples that nobody has."""
        return any(job.waiting for job in self._jobs.values())

    def workers(self) -> set[str]:
        """Who holds samples."""
        return {worker for job in self._jobs.values() for worker in job.holders()}

    def describe(self) -> str:
        """The first incomplete job, for displays; empty without one."""
        return next((str(job) for job in self._jobs.values() if not job.complete), "")

    def _find(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise Refused(f"evaluation {job_id} is not known (any more); put it again")
        return self._jobs[job_id]

    def _close(self, job: Job) -> None:
        """Let a complete job's version go, and forget jobs from long ago."""
        if not job.complete:
            return
        self._mailbox.unpin(job.request.job_id)
        done = [job_id for job_id, other in self._jobs.items() if other.complete]
        for job_id in done[:-KEPT_JOBS]:
            del self._jobs[job_id]


def _claims(job: Job, places: list[Place]) -> tuple[EvaluationClaim, ...]:
    """One claim per prompt."""
    indices: dict[int, list[int]] = {}
    for uid, index in places:
        indices.setdefault(uid, []).append(index)
    return tuple(
        EvaluationClaim(
            job_id=job.request.job_id,
            manifest=job.manifest,
            prompt=job.prompts[uid],
            indices=tuple(chosen),
            sampling=job.request.sampling,
        )
        for uid, chosen in indices.items()
    )
