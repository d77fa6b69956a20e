"""The door, `tvq train|eval|sample`: reads the command line, starts the program, sets the exit code."""

import argparse
import dataclasses
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from etils import epath

from tvq import cluster, config, evaluate, sample, train
from tvq.data.corpus import cache_folder

COMMANDS: dict[str, tuple[Callable, str, str]] = {
    "train": (
        train.train,
        "train a model, or go on with the run in --workdir",
        """
        tvq train --config=configs/debug.py --workdir=runs/debug
        tvq train --config=configs/debug.py --workdir=runs/mesh --cpu_devices=8 --config.mesh.devices=8
        tvq train --config=configs/debug.py --workdir=runs/books \\
            --config.data.source=text --config.data.path=books/
        """,
    ),
    "eval": (
        evaluate.evaluate,
        "score a split with the newest checkpoint of a run",
        """
        tvq eval --workdir=runs/debug
        tvq eval --workdir=runs/debug --split=test --batch_size=4
        """,
    ),
    "sample": (
        sample.sample,
        "continue a prompt with the newest checkpoint of a run",
        """
        tvq sample --workdir=runs/debug --prompt="import "
        tvq sample --workdir=runs/debug --prompt="def " --n_sample=3 --length=200 \\
            --temperature=0.8 --nucleus=0.95
        """,
    ),
}
# Short forms: `--split=test` is `--config.evaluate.split=test`.
SHORT = {"eval": config.Evaluate, "sample": config.Sample}
SECTION = {"eval": "evaluate", "sample": "sample"}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tvq", description="Transformer-VQ: training in linear time.", allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what, examples) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ") + _fields(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
        needed = name == "train"
        default = "" if needed else " (default: that of the run)"
        command.add_argument("--config", required=needed, metavar="FILE", help=f"config file{default}")
        command.add_argument(
            "--cpu_devices", type=int, metavar="N", help="use N CPU devices, whatever accelerator there is"
        )
        for field in dataclasses.fields(SHORT[name]) if name in SHORT else ():
            option = f"--{field.name}"
            command.add_argument(option, metavar="VALUE", help=str(field.metadata["doc"]), dest=field.name)
    return top


def _fields() -> str:
    """The schema, for --help."""
    defaults = config.flatten(config.base())
    lines = [f"  --config.{name}={defaults[name]!r:10} {doc}" for name, doc in config.docs().items()]
    return "\n\nevery field of the config, with its default:\n" + "\n".join(lines).replace("%", "%%")


def read_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> config.Config:
    """The config of the file, or of the run in the workdir, with the command line's fields."""
    if arguments.config:
        found = config.load(arguments.config)
    else:
        path = epath.Path(arguments.workdir) / config.FILE
        if not path.exists():
            raise ValueError(f"--workdir={arguments.workdir} holds no run: there is no {path}")
        found = config.recorded(path)
    for text in overrides:
        name, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config.") or not equals:
            raise ValueError(f"{text} is no option; fields are set as --config.section.field=value")
        config.override(found, name, value)
    for field in dataclasses.fields(SHORT[arguments.command]) if arguments.command in SHORT else ():
        value = getattr(arguments, field.name)
        if value is not None:
            config.override(found, f"{SECTION[arguments.command]}.{field.name}", value)
    return config.build(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (DESIGN: 0 done, 2 bad input, 75 stopped and saved)."""
    arguments, overrides = parser().parse_known_args(argv)
    try:
        run = read_config(arguments, overrides)
        if arguments.cpu_devices is not None:
            if arguments.cpu_devices < 1:
                raise ValueError(f"--cpu_devices must be at least 1, not {arguments.cpu_devices}")
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            # A restart then compiles nothing.
            jax.config.update("jax_compilation_cache_dir", str(cache_folder(run.data) / "compiled"))
        place = cluster.find(run.cluster, os.environ, cluster.tpu_metadata(os.environ))
        log = cluster.Log(cluster.log_folder(arguments.workdir), place)
        with cluster.guard(place, log.say):
            return COMMANDS[arguments.command][0](run, epath.Path(arguments.workdir), place, log)
    except ValueError as error:
        # Raised by us it is the user's to mend; raised by a library it is our mistake, with its traceback.
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if Path(__file__).parent not in origin.parents:
            raise
        print(f"tvq: {error}", file=sys.stderr)
        return cluster.EXIT_INPUT


if __name__ == "__main__":
    sys.exit(main())
