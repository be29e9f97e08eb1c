"""Several processes on this machine, started by torchrun's own launcher.

Does what `torchrun --standalone --nproc-per-node N` does, but ends with the status of the process
that failed, and without a traceback of the launcher's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from manifests.errors import PipeError
from manifests.publish import new_id

#: After a signal the processes may take so long to end their step and save (seconds).
_SHUTDOWN_SECONDS = "120"


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run the command line with `arguments` in so many processes; the exit status of all.

    Raises `PipeError` where one was killed: it cannot say so itself.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, without its warning
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=new_id(),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    command = ["-m", "omnigen_pipe.cli", *arguments]
    try:
        launch_agent(settings, sys.executable, command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise PipeError(
                f"Process {rank} of {processes} was ended by signal {-failure.exitcode}, and the "
                "others with it. Checkpoints are whole: the same command goes on from the newest."
            ) from error
        return int(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
