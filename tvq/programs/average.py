"""`tvq average`: the mean of weights and codebooks over several checkpoints of a run, as a weights folder."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tvq import cluster, schema, sharding
from tvq.errors import InputError
from tvq.programs import interop
from tvq.run import metrics, restore, tensors, workdir
from tvq.run.checkpoint import Restored
from tvq.schema import Config


def average(
    config: Config,
    run: epath.Path,
    place: cluster.Place,
    log: cluster.Log,
    *,
    output: str,
    steps: str | None,
    last: str | None,
) -> int:
    """Writes the mean of the checkpoints of `steps`, or of the `last` so many, as `tvq export` does one."""
    place.check_alone("average")
    chosen = choose(workdir.steps(run), steps, last)
    interop.check_output(output)
    mesh, console = sharding.make(schema.Mesh(), jax.devices()[:1]), metrics.Console()
    whole = mean(restore.weights(config, run, mesh, log.say, step) for step in chosen)
    named = ", ".join(map(str, chosen))
    console.say(interop.write(config, output, whole, {"averaged": named}, f"the mean of steps {named}"))
    console.say(f"to use them: tvq import --input={output} --workdir=NEW")
    return 0


def choose(saved: list[int], steps: str | None, last: str | None) -> list[int]:
    """The steps to average, of those that are saved. InputError: they are not two or more of these."""
    if (steps is None) == (last is None):
        raise InputError("say which checkpoints to average: either --steps=STEP,STEP,... or --last=N")
    option = f"--last={last}" if steps is None else f"--steps={steps}"
    there = f"; there are checkpoints of steps {', '.join(map(str, saved))}" if saved else "; there are none"
    try:
        chosen = saved[-int(last or "") :] if steps is None else [int(step) for step in steps.split(",")]
        n = int(last or "") if steps is None else len(set(chosen))
    except ValueError:
        raise InputError(f"{option} must be whole numbers{there}") from None
    missing = [str(step) for step in chosen if step not in saved]
    if missing:
        raise InputError(f"{option}: there is no checkpoint of step {', '.join(missing)}{there}")
    if n < 2 or n != len(chosen):
        raise InputError(f"{option} must be two or more different checkpoints, of those there are{there}")
    return sorted(chosen)


def mean(checkpoints: Iterable[Restored]) -> Restored:
    """The newest of the checkpoints with the mean of all, added up in float64, in place of its floats."""
    total: dict[str, np.ndarray] = {}
    newest, n = None, 0
    for newest in checkpoints:
        n += 1
        for name, x in tensors.named(newest.state).items():
            if jnp.issubdtype(x.dtype, jnp.floating):
                total[name] = total.get(name, np.zeros(x.shape)) + np.asarray(x, np.float64)
    assert newest is not None, "there is nothing to average"
    named = tensors.named(newest.state)
    leaves = [(total[name] / n).astype(x.dtype) if name in total else x for name, x in named.items()]
    return newest._replace(state=jax.tree.unflatten(jax.tree.structure(newest.state), leaves))
