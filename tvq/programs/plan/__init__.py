"""What a run will cost, `tvq plan`: its train step, compiled for a machine that is not present.

Nothing is executed: the machine's own compiler says what memory the step needs, and its program is read for
products, memory traffic and messages between devices. Times assume a machine that reaches its data sheet:
bounds for comparing shapes, not predictions.
"""

from etils import epath

from tvq import cluster, sharding
from tvq.programs.plan import report, step, sweep, targets
from tvq.programs.plan.step import TooLargeError
from tvq.run import metrics
from tvq.schema import Config

DOES_NOT_FIT = 1  # the exit code


def plan(config: Config, output: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints what the train step costs, or with plan.sweep a table of mesh shapes; 1 if nothing fits."""
    place.check_alone("plan")
    console = metrics.Console()
    devices = targets.devices(config.plan.topology)
    if not config.plan.sweep:
        try:
            estimate = step.estimate(config, sharding.make(config.mesh, devices, config))
        except TooLargeError as error:
            console.say(report.too_large(error))
            return DOES_NOT_FIT
        console.say(report.page(config, estimate))
        return 0 if estimate.fits else DOES_NOT_FIT
    return 0 if sweep.sweep(config, devices, console) else DOES_NOT_FIT
