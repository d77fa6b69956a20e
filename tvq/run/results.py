"""The results of `tvq eval` and `tvq recall`: each in a file of its own, whose name tells them apart."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable

from etils import epath
from jax.sharding import Mesh

from tvq import atomic, cluster, numerics
from tvq.config import to_dict
from tvq.run import records
from tvq.schema import Config

FOLDER = "evaluations"


def record(
    workdir: epath.Path,
    config: Config,
    name: str,
    chosen: dict,
    result: dict,
    mesh: Mesh,
    say: Callable[[str], None],
) -> None:
    """Writes the result, and what repeats it, as `workdir/evaluations/NAME_SETTINGS.json`.

    SETTINGS is a digest of all that changes the result: the model, the settings of jax, and what is `chosen`
    besides. A result that differs in spite of that, as of weights trained again, gets a number too. Where
    nothing can be written, as in a run of somebody else, it says so: the result has been printed.
    """
    settings = {"model": dataclasses.asdict(config.model), "jax": numerics.deciding(), **chosen}
    digest = hashlib.sha256(records.to_json(settings).encode()).hexdigest()[:8]
    result = result | {"settings": digest}
    more = {
        "code": cluster.code_version(),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "jax": settings["jax"],
        "config": to_dict(config),
    }
    folder = workdir / FOLDER
    numbers = itertools.chain([""], (f"_{i}" for i in itertools.count(2)))
    try:
        paths = (folder / f"{name}_{digest}{number}.json" for number in numbers)
        path = next(path for path in paths if not path.exists() or _has(path, result))
        atomic.write(path, records.to_json(result | more, indent=1) + "\n")
    except OSError as error:
        say(f"warning: {folder} cannot be written ({error.strerror}): the result is printed but not saved")


def _has(path: epath.Path, result: dict) -> bool:
    """Whether a file has the same result; one that was cut short has none."""
    try:
        written = json.loads(path.read_text())
    except ValueError:
        return False
    wanted = json.loads(records.to_json(result))
    return isinstance(written, dict) and wanted.items() <= written.items()
