"""The command line, `tvq COMMAND`: reads the options, starts the program, sets the exit code."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from tvq import EXIT_INTERRUPTED, cluster, config, end_at_interrupt, paths, schema, words
from tvq.data.corpus import cache_folder
from tvq.errors import DisagreementError, DivergedError, InputError, SaveError
from tvq.programs import prepare

# Module and function of each program, which is imported only when its command is given: importing all of them
# takes longer than many commands do.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": (
        "train.train",
        "train a model, or resume the run in --workdir",
        """
        tvq train --config=configs/debug.py --workdir=runs/debug
        tvq train --config=configs/debug.py --workdir=runs/mesh --cpu_devices=8 --config.mesh.devices=8
        tvq train --config=configs/debug.py --workdir=runs/books \\
            --config.data.source=text --config.data.path=books/
        """,
    ),
    "eval": (
        "evaluate.evaluate",
        "score a split with the newest checkpoint of a run",
        """
        tvq eval --workdir=runs/debug
        tvq eval --workdir=runs/debug --split=test --batch_size=4
        """,
    ),
    "recall": (
        "recall.recall",
        "measure how far back a model can look something up",
        """
        tvq recall --workdir=runs/debug
        tvq recall --workdir=runs/debug --length=65536 --n_sequence=1
        """,
    ),
    "sample": (
        "sample.sample",
        "continue a prompt with the newest checkpoint of a run",
        """
        tvq sample --workdir=runs/debug --prompt="import "
        tvq sample --workdir=runs/debug --prompt="def " --n_sample=3 --length=200 \\
            --temperature=0.8 --nucleus=0.95
        tvq sample --workdir=runs/debug --prompt="class " --length=1000 --stream
        tvq sample --workdir=runs/debug --prompts=prompts.txt --output=answers
        tvq sample --workdir=runs/debug --document=book.txt --save_state=book.state
        tvq sample --workdir=runs/debug --from_state=book.state --prompt="Who is "
        """,
    ),
    "import": (
        "interop.bring_in",
        "start a run from imported weights",
        """
        tvq import --input=checkpoint_125000 --config=configs/enwik8.py --workdir=runs/original
        tvq import --input=weights --workdir=runs/copy
        """,
    ),
    "export": (
        "interop.send_out",
        "write the newest weights of a run as safetensors",
        """
        tvq export --workdir=runs/debug --output=weights
        """,
    ),
    "bench": (
        "bench.bench",
        "measure speed and memory of programs checked to agree",
        """
        tvq bench train --config=configs/debug.py --output=runs/bench --lengths=512,2048,8192
        tvq bench attention --config=configs/debug.py --output=runs/core --formulations=auto,serial,full
        tvq bench decode --config=configs/debug.py --output=runs/decode --contexts=1000,10000
        tvq bench data --config=configs/debug.py --output=runs/data
        """,
    ),
    "doctor": (
        "doctor.doctor",
        "say what is wrong with a run, and what to change",
        """
        tvq doctor --workdir=runs/debug
        """,
    ),
    "profile": (
        "profile.profile",
        "say what a train step spends its time on",
        """
        tvq profile --config=configs/debug.py --output=runs/profile
        """,
    ),
    "plan": (
        "plan.plan",
        "predict what a train step costs, without the machine",
        """
        tvq plan --config=configs/debug.py --topology=v5e:4x4
        tvq plan --config=configs/debug.py --topology=h200:8 --sweep
        """,
    ),
}
# It has neither config nor run: its options are its own.
PREPARE = """
tvq prepare enwik8 --download --input=raw/enwik8.zip --output=data/enwik8
tvq prepare pg19 --download --input=raw/pg19 --output=data/pg19
tvq prepare imagenet64 --input=raw/imagenet64 --output=data/imagenet64
tvq prepare text --input=pages.jsonl.zst --column=body --output=data/pages
tvq prepare images --input=photos --size=32 --output=data/photos
"""
CONFIG = """
tvq config --config=configs/debug.py
tvq config --config=configs/debug.py --config.train.steps=2000
tvq config --workdir=runs/debug
"""
REPORT = """
tvq report --workdir=runs/debug
tvq report --workdir=runs/debug runs/mine --output=runs/compared
"""
# Short forms: `--split=test` is `--config.evaluate.split=test`.
SHORT = {
    "eval": config.Evaluate,
    "recall": config.Recall,
    "sample": config.Sample,
    "bench": config.Bench,
    "plan": config.Plan,
}
SECTION = {"eval": "evaluate", "recall": "recall", "sample": "sample", "bench": "bench", "plan": "plan"}
QUIET = "plain lines, as without a terminal"
# The options of a command that are not in the config.
OPTIONS = {
    "sample": {
        "prompts": "file of prompts, one per line or in the field `prompt` of a .jsonl; images to complete",
        "document": "file that is read once and put before each prompt",
        "save_state": "save what the model keeps of the document to this file",
        "from_state": "start from a saved file instead of its document",
        "output": "folder for one file per text or image",
    },
    "import": {"input": "checkpoint of the original program (msgpack), or folder of tvq export"},
    "export": {"output": "folder for the weights"},
}
FLAGS = {"sample": {"stream": "write to the terminal while sampling"}}
# Forbids operations whose order of summation may change, and choosing kernels by timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tvq", description="Transformer-VQ. tvq COMMAND --help shows its options.", allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fields = config.listing(config.Config(), config.base()).replace("%", "%%")
    for name, (_, what, examples) in COMMANDS.items():
        command = _add(commands, name, what, examples)
        command.epilog = (
            f"{command.epilog}\n\nevery field of the config can be set; these are the defaults:\n{fields}"
        )
        if name == "bench":
            command.add_argument("kind", choices=schema.BENCHES, help="what to measure")
        if name in ("bench", "profile"):
            command.add_argument(
                "--output", dest="workdir", required=True, metavar="DIR", help="folder for the results"
            )
        elif name == "plan":
            command.set_defaults(workdir=".", cpu_devices=1)  # it writes nothing, and computes nothing
        else:
            command.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
        needed = name in ("train", "bench", "profile", "plan")
        default = "" if needed else " (default: that of the run)"
        command.add_argument("--config", required=needed, metavar="FILE", help=f"config file{default}")
        if name != "plan":
            command.add_argument(
                "--cpu_devices",
                type=int,
                metavar="N",
                help="use N CPU devices, even if there is an accelerator",
            )
        for option, meaning in OPTIONS.get(name, {}).items():
            needed = name != "sample"
            command.add_argument(f"--{option}", required=needed, metavar="PATH", help=meaning)
        for option, meaning in FLAGS.get(name, {}).items():
            command.add_argument(f"--{option}", action="store_true", help=meaning)
        for field in short(name):
            if (name, field.name) == ("bench", "kind"):
                continue  # a positional argument, added above
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.type is bool else {}
            doc = f"{field.metadata['doc']} (config.{SECTION[name]}.{field.name})".replace("%", "%%")
            command.add_argument(f"--{field.name}", metavar="VALUE", help=doc, dest=field.name, **switch)
    _add_prepare(commands)
    _add_config(commands)
    _add_report(commands)
    return top


def short(command: str) -> list[dataclasses.Field]:
    """The fields with a short form: those of the command's section, except how often `tvq train` does it."""
    return [f for f in dataclasses.fields(SHORT[command]) if f.name != "every"] if command in SHORT else []


def _add(commands: Any, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--quiet", action="store_true", help=QUIET)
    return command


def _add_config(commands: Any) -> None:
    command = _add(commands, "config", "print a config in full, with the meaning of each field", CONFIG)
    command.add_argument("--config", metavar="FILE", help="config file")
    command.add_argument("--workdir", metavar="DIR", help="folder of a run, for its config")


def _add_report(commands: Any) -> None:
    command = _add(commands, "report", "draw one run, or several side by side, on an HTML page", REPORT)
    command.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    command.add_argument("more", nargs="*", metavar="DIR", help="folders of other runs")
    command.add_argument("--output", default="", metavar="DIR", help="default: WORKDIR/report")


def _add_prepare(commands: Any) -> None:
    command = _add(commands, "prepare", "make data ready for training", PREPARE)
    kinds = "; ".join(f"{kind}: {what}" for kind, what in prepare.KINDS.items())
    command.add_argument("kind", choices=prepare.KINDS, help=kinds, metavar="|".join(prepare.KINDS))
    for field in dataclasses.fields(prepare.Options)[1:]:
        usual = f" (default {field.default})" if field.default else ""
        doc = (field.metadata["doc"] + usual).replace("%", "%%")
        how: dict[str, Any] = {"default": field.default, "help": doc}
        if field.type is bool:
            how["action"] = "store_true"
        else:
            how |= {"type": field.type, "required": field.name in ("input", "output"), "metavar": "VALUE"}
        command.add_argument(f"--{field.name}", **how)


def refuse(more: Sequence[str], arguments: argparse.Namespace) -> None:
    """InputError if there are options that the command does not have."""
    for text in more:
        close = difflib.get_close_matches(text.partition("=")[0].strip("-"), vars(arguments), n=1)
        hint = f"did you mean --{close[0]}?" if close else f"see tvq {arguments.command} --help"
        raise InputError(f"{text} is not an option; {hint}")


def prepare_options(arguments: argparse.Namespace) -> prepare.Options:
    return prepare.Options(
        **{f.name: getattr(arguments, f.name) for f in dataclasses.fields(prepare.Options)}
    )


def starting_config(arguments: argparse.Namespace) -> ConfigDict:
    """The config of the file, of the run in the workdir, or of the imported weights."""
    if arguments.config:
        return config.load(arguments.config)
    if arguments.workdir is None:
        raise InputError("tvq config needs a --config file or the --workdir of a run")
    is_import = arguments.command == "import"
    folder = epath.Path(arguments.input if is_import else arguments.workdir)
    if is_import and program("interop.is_ours")(folder) and not folder.is_dir():
        folder = folder.parent  # of the weights
    path = folder / config.FILE
    if is_import and not path.exists():
        raise InputError(f"--input={arguments.input} comes without {config.FILE}; give --config")
    if not path.exists():
        raise InputError(f"--workdir={arguments.workdir} holds no run: there is no {path}")
    return config.recorded(path)


def read_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> config.Config:
    """The starting config with the fields that the command line sets."""
    draft = starting_config(arguments)
    for text in overrides:
        name, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config.") or not equals:
            option = text.partition("=")[0].strip("-")
            close = difflib.get_close_matches(option, vars(arguments), n=1)
            hint = (
                f"did you mean --{close[0]}?" if close else "fields are set as --config.section.field=value"
            )
            raise InputError(f"{text} is not an option; {hint}")
        config.override(draft, name, value)
    for field in short(arguments.command):
        value = getattr(arguments, field.name)
        if value is not None:
            config.override(draft, f"{SECTION[arguments.command]}.{field.name}", value)
    return config.build(draft)


def program(name: str) -> Callable[..., Any]:
    """The function `module.function` of tvq.programs."""
    module, _, function = name.partition(".")
    start: Callable[..., Any] = getattr(importlib.import_module(f"tvq.programs.{module}"), function)
    return start


@contextlib.contextmanager
def explained(say: Callable[[str], None]) -> Iterator[None]:
    """Ends the process with a message and an exit code, without a traceback, at errors meant for the user."""
    if signal.getsignal(signal.SIGINT) is end_at_interrupt:  # from now on Ctrl-C is handled here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (cluster.ClusterError, DisagreementError, SaveError) as error:
        say(f"tvq: {error}")
        sys.exit(cluster.EXIT_FAILED)
    except DivergedError as error:
        say(f"tvq: {error}")
        sys.exit(cluster.EXIT_DIVERGED)
    except InputError as error:
        say(f"tvq: {error}")
        sys.exit(cluster.EXIT_INPUT)
    except KeyboardInterrupt:
        say("tvq: interrupted")
        sys.exit(EXIT_INTERRUPTED)


def open_log(workdir: str, place: cluster.Place) -> cluster.Log:
    """The log of this process. InputError: the workdir cannot be written."""
    with cluster.writing("--workdir", workdir):
        return cluster.Log(cluster.log_folder(workdir), place)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, or exits with it (0 done, 2 bad input, 3 diverged, 75 saved)."""
    words.begin()
    arguments, overrides = parser().parse_known_args(argv)
    if arguments.command == "train":
        sys.stdout = words.guarded(sys.stdout)  # only messages: the record has all results
    with explained(words.tell):
        paths.expand_options(vars(arguments))
        if arguments.quiet:
            os.environ["TERM"] = "dumb"  # a terminal without escape codes, for this program and its children
        if arguments.command == "prepare":
            refuse(overrides, arguments)
            return prepare.prepare(prepare_options(arguments))
        if arguments.command == "report":
            refuse(overrides, arguments)
            return program("report.report")([arguments.workdir, *arguments.more], arguments.output)
        run = read_config(arguments, overrides)
        if arguments.command == "config":
            print(config.listing(run, starting_config(arguments)))
            print(f"\n* set by {arguments.config or arguments.workdir}; > set here; all others are defaults")
            return 0
        if arguments.cpu_devices is not None:
            if arguments.cpu_devices < 1:
                raise InputError(f"--cpu_devices must be at least 1, not {arguments.cpu_devices}")
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        if run.train.reproducible:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
        if "float64" in (run.model.dtype, run.model.param_dtype):
            if run.model.dtype != run.model.param_dtype:
                raise InputError(
                    f"config.model.dtype {run.model.dtype} and config.model.param_dtype"
                    f" {run.model.param_dtype} do not go together; use float64 for both or neither"
                )
            jax.config.update("jax_enable_x64", True)  # or jax would compute in float32 and only warn
        if arguments.command in ("bench", "profile", "plan"):
            jax.config.update("jax_enable_compilation_cache", False)  # or compile times would be wrong
        elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            # A restart then compiles nothing.
            jax.config.update("jax_compilation_cache_dir", str(cache_folder(run.data) / "compiled"))
        place = cluster.find(run.cluster, os.environ, cluster.tpu_metadata(os.environ))
        log = open_log(arguments.workdir, place)
    # The guard is outside: with several processes it must see the exit, to leave at once.
    with contextlib.closing(log), cluster.guard(place, log.say), explained(log.say):
        names = [*OPTIONS.get(arguments.command, {}), *FLAGS.get(arguments.command, {})]
        asked = {name: getattr(arguments, name) for name in names}
        start = program(COMMANDS[arguments.command][0])
        code: int = start(run, epath.Path(arguments.workdir), place, log, **asked)
        return code if arguments.command == "train" else words.arrived(code, log.say)


if __name__ == "__main__":
    sys.exit(main())
