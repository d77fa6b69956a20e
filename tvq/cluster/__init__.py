"""The processes of a run: their rendezvous, agreement, barriers, common stop and failures.

`place` finds the coordinator, the number of processes and this one's id; `meeting` is the rendezvous before
jax starts; `processes` starts jax once and has barriers, agreement and the stop at one step; `watchdog` ends
a process that is stuck and names the one that holds it up; `log` is the log file of each process.
"""

from tvq.cluster.log import Log, local_folder, log_folder
from tvq.cluster.meeting import code_version
from tvq.cluster.place import Place, find, tpu_metadata
from tvq.cluster.processes import Processes, guard, start
from tvq.cluster.watchdog import Watchdog
from tvq.errors import (
    EXIT_DIVERGED,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_STOPPED,
    EXIT_STUCK,
    ClusterError,
    writing,
)

__all__ = [
    "EXIT_DIVERGED",
    "EXIT_FAILED",
    "EXIT_INPUT",
    "EXIT_STOPPED",
    "EXIT_STUCK",
    "ClusterError",
    "Log",
    "Place",
    "Processes",
    "Watchdog",
    "code_version",
    "find",
    "guard",
    "local_folder",
    "log_folder",
    "start",
    "tpu_metadata",
    "writing",
]
