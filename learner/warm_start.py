"""The warm start alone (`slipstream sft`): trains, leaves the checkpoint of step 0, and ends."""

import asyncio
import sys
import threading
from pathlib import Path

from ..buffer.process import run_process
from .config import LearnerSpec
from .trainer import Trainer


async def warm_start(spec: LearnerSpec) -> None:
    """Prepare a policy as a run would, and save it.

    SIGTERM ends it at the next update, without a checkpoint: half a warm start is none.
    """
    stop = threading.Event()
    trainer = Trainer(spec)
    work = asyncio.create_task(asyncio.to_thread(trainer.prepare, stop))
    try:
        await asyncio.shield(work)
        trainer.end()
    except asyncio.CancelledError:
        stop.set()
        await work
        raise


if __name__ == "__main__":
    arguments = LearnerSpec.model_validate_json(Path(sys.argv[1]).read_text())
    run_process("learner", arguments.run_dir, warm_start(arguments))
