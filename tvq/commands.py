"""What each program is: its help, its options, its section of the config. Another program is one more entry.

The command line reads this table, and imports a program only when its command is given: importing all of them
takes longer than many commands do. No jax.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tvq import schema

# The keywords of argparse's `add_argument`, by flag or, of a positional argument, by name.
Options = Mapping[str, Mapping[str, Any]]


def path(meaning: str, **more: Any) -> dict[str, Any]:
    return {"metavar": "PATH", "help": meaning} | more


def folder(meaning: str, **more: Any) -> dict[str, Any]:
    return {"metavar": "DIR", "help": meaning} | more


WORKDIR = {"--workdir": folder("folder of the run", required=True)}
OUTPUT = {"--output": folder("folder for the results", dest="workdir", required=True)}
CONFIG = {"--config": {"metavar": "FILE", "help": "config file", "required": True}}
RUN_CONFIG = {"--config": {"metavar": "FILE", "help": "config file (default: that of the run)"}}
CPU = {
    "--cpu_devices": {
        "type": int,
        "metavar": "N",
        "help": "use N CPU devices, even if there is an accelerator",
    }
}
RUN = WORKDIR | RUN_CONFIG | CPU
CHECKPOINT = (
    {"--workdir": folder("folder of the run; DIR@STEP: that checkpoint, not the newest", required=True)}
    | RUN_CONFIG
    | CPU
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """`start` is the dotted name of a function. It is called with what it `takes`, and returns the exit code:

    - `options`: those of `own`, by name;
    - `config`: a Config, the ConfigDict it was before the command line, the name of its source;
    - `devices`: a Config, the workdir, this process's place and log, and the options of `own`, by name.
    """

    help: str
    examples: str
    start: str
    takes: Literal["options", "config", "devices"] = "devices"
    common: Options = dataclasses.field(default_factory=dict)  # read by the command line
    own: Options = dataclasses.field(default_factory=dict)  # read by the program
    section: str = ""  # of the config: `--split=test` is then `--config.evaluate.split=test`
    # Of common options that the command does not have.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The dotted name of a function of the options of `own` that returns the path of the config where no
    # --config is given. Without one it is that of the run in the workdir.
    recorded_config: str = ""
    prints_result: bool = True  # so that it fails where standard output does; else there are only messages
    at_step: bool = False  # whether --workdir may be RUN@STEP; the program gets the step, or None, as `at`
    keeps_programs: bool = True  # compiled ones, for the next start


def program(name: str) -> Callable[..., Any]:
    """The function of a dotted name, whose module is imported now."""
    module, _, function = name.rpartition(".")
    start: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return start


def of_prepare() -> Options:
    """The options of `tvq prepare`, from the schema."""
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in schema.RAW.items())
    options: dict[str, dict[str, Any]] = {
        "kind": {"choices": schema.RAW, "help": kinds, "metavar": "|".join(schema.RAW)}
    }
    for field in dataclasses.fields(schema.Prepare)[1:]:
        usual = f" (default {field.default})" if field.default else ""
        how = {"default": field.default, "help": (field.metadata["doc"] + usual).replace("%", "%%")}
        if field.type is bool:
            how["action"] = "store_true"
        else:
            how |= {"type": field.type, "required": field.name in ("input", "output"), "metavar": "VALUE"}
        options[f"--{field.name}"] = how
    return options


COMMANDS: dict[str, Command] = {
    "train": Command(
        help="train a model, or resume the run in --workdir",
        examples="""
        tvq train --config=configs/debug.py --workdir=runs/debug
        tvq train --config=configs/debug.py --workdir=runs/mesh --cpu_devices=8 --config.mesh.devices=8
        tvq train --config=configs/debug.py --workdir=runs/books \\
            --config.data.source=text --config.data.path=books/
        tvq train --config=configs/debug.py --workdir=runs/branch --from=runs/debug@300
        """,
        start="tvq.programs.train.train",
        common=WORKDIR | CONFIG | CPU,
        own={
            "--from": {
                "metavar": "RUN[@STEP]",
                "help": "start from this checkpoint of another run, with its optimizer state and step",
            },
            "--from_weights": {
                "metavar": "RUN[@STEP]",
                "help": "start from its weights and codebooks alone, at step 0",
            },
        },
        prints_result=False,  # the record has all results
    ),
    "eval": Command(
        help="score a split with the newest checkpoint of a run",
        examples="""
        tvq eval --workdir=runs/debug
        tvq eval --workdir=runs/debug --split=test --batch_size=4
        tvq eval --workdir=runs/debug@300
        """,
        start="tvq.programs.evaluate.evaluate",
        common=CHECKPOINT,
        at_step=True,
        section="evaluate",
    ),
    "recall": Command(
        help="measure how far back a model can look something up",
        examples="""
        tvq recall --workdir=runs/debug
        tvq recall --workdir=runs/debug --length=65536 --n_sequence=1
        """,
        start="tvq.programs.recall.recall",
        common=CHECKPOINT,
        at_step=True,
        section="recall",
    ),
    "sample": Command(
        help="continue a prompt with the newest checkpoint of a run",
        examples="""
        tvq sample --workdir=runs/debug --prompt="import "
        tvq sample --workdir=runs/debug --prompt="def " --n_sample=3 --length=200 \\
            --temperature=0.8 --nucleus=0.95
        tvq sample --workdir=runs/debug --prompt="class " --length=1000 --stream
        tvq sample --workdir=runs/debug --prompts=prompts.txt --output=answers
        tvq sample --workdir=runs/debug --document=book.txt --save_state=book.state
        tvq sample --workdir=runs/debug --from_state=book.state --prompt="Who is "
        """,
        start="tvq.programs.sample.sample",
        common=CHECKPOINT,
        at_step=True,
        own={
            "--prompts": path(
                "file of prompts, one per line or in the field `prompt` of a .jsonl; images to complete"
            ),
            "--document": path("file that is read once and put before each prompt"),
            "--save_state": path("save what the model keeps of the document to this file"),
            "--from_state": path("start from a saved file instead of its document"),
            "--output": path("folder for one file per text or image"),
            "--stream": {"action": "store_true", "help": "write to the terminal while sampling"},
        },
        section="sample",
    ),
    "import": Command(
        help="start a run from imported weights",
        examples="""
        tvq import --input=checkpoint_125000 --config=configs/enwik8.py --workdir=runs/original
        tvq import --input=weights --workdir=runs/copy
        """,
        start="tvq.programs.interop.bring_in",
        common=RUN,
        own={
            "--input": path(
                "checkpoint of the original program (msgpack), or folder of tvq export", required=True
            )
        },
        recorded_config="tvq.programs.interop.recorded_config",
    ),
    "export": Command(
        help="write the newest weights of a run as safetensors",
        examples="""
        tvq export --workdir=runs/debug --output=weights
        tvq export --workdir=runs/debug --output=folder --format=hf
        """,
        start="tvq.programs.interop.send_out",
        common=CHECKPOINT,
        at_step=True,
        own={
            "--output": path("folder for the weights", required=True),
            "--format": {
                "choices": ("tvq", "hf"),
                "default": "tvq",
                "help": "hf: with config and code for Hugging Face's transformers (default: tvq)",
            },
        },
    ),
    "average": Command(
        help="average the weights of checkpoints of a run",
        examples="""
        tvq average --workdir=runs/debug --last=3 --output=mean
        tvq average --workdir=runs/debug --steps=300,400 --output=mean
        """,
        start="tvq.programs.average.average",
        common=RUN,
        own={
            "--output": path("folder for the weights, as tvq export writes them", required=True),
            "--steps": {"metavar": "STEP,...", "help": "the checkpoints of these steps"},
            "--last": {"metavar": "N", "help": "the last N checkpoints that are kept"},
        },
    ),
    "bench": Command(
        help="measure speed and memory of programs checked to agree",
        examples="""
        tvq bench train --config=configs/debug.py --output=runs/bench --lengths=512,2048,8192
        tvq bench attention --config=configs/debug.py --output=runs/core --formulations=auto,serial,full
        tvq bench decode --config=configs/debug.py --output=runs/decode --contexts=1000,10000
        tvq bench data --config=configs/debug.py --output=runs/data
        """,
        start="tvq.programs.bench.bench",
        common={"kind": {"choices": schema.BENCHES, "help": "what to measure"}} | OUTPUT | CONFIG | CPU,
        section="bench",
        keeps_programs=False,  # or compile times would be wrong
    ),
    "doctor": Command(
        help="say what is wrong with a run, and what to change",
        examples="""
        tvq doctor --workdir=runs/debug
        """,
        start="tvq.programs.doctor.doctor",
        common=RUN,
    ),
    "profile": Command(
        help="say what a train step spends its time on",
        examples="""
        tvq profile --config=configs/debug.py --output=runs/profile
        """,
        start="tvq.programs.profile.profile",
        common=OUTPUT | CONFIG | CPU,
        keeps_programs=False,
    ),
    "plan": Command(
        help="predict what a train step costs, without the machine",
        examples="""
        tvq plan --config=configs/debug.py --topology=v5e:4x4
        tvq plan --config=configs/debug.py --topology=h200:8 --sweep
        """,
        start="tvq.programs.plan.plan",
        common=CONFIG,
        section="plan",
        defaults={"workdir": ".", "cpu_devices": 1},  # it writes nothing, and computes nothing
        keeps_programs=False,
    ),
    "prepare": Command(
        help="make data ready for training",
        examples="""
        tvq prepare enwik8 --download --input=raw/enwik8.zip --output=data/enwik8
        tvq prepare pg19 --download --input=raw/pg19 --output=data/pg19
        tvq prepare imagenet64 --input=raw/imagenet64 --output=data/imagenet64
        tvq prepare text --input=pages.jsonl.zst --column=body --output=data/pages
        tvq prepare images --input=photos --size=32 --output=data/photos
        """,
        start="tvq.programs.prepare.start",
        takes="options",
        own=of_prepare(),
        prints_result=False,
    ),
    "config": Command(
        help="print a config in full, with the meaning of each field",
        examples="""
        tvq config --config=configs/debug.py
        tvq config --config=configs/debug.py --config.train.steps=2000
        tvq config --workdir=runs/debug
        """,
        start="tvq.programs.show.show",
        takes="config",
        common={
            "--config": {"metavar": "FILE", "help": "config file"},
            "--workdir": folder("folder of a run, for its config"),
        },
    ),
    "report": Command(
        help="draw one run, or several side by side, on an HTML page",
        examples="""
        tvq report --workdir=runs/debug
        tvq report --workdir=runs/debug runs/mine --output=runs/compared
        """,
        start="tvq.programs.report.start",
        takes="options",
        own=WORKDIR
        | {
            "more": folder("folders of other runs", nargs="*"),
            "--output": folder("default: WORKDIR/report", default=""),
        },
        prints_result=False,
    ),
}
