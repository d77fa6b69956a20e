"""The command line, `tvq COMMAND`: reads the options, starts the program, sets the exit code."""

import argparse
import dataclasses
import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

from etils import epath
from ml_collections import ConfigDict

from tvq import config, paths, schema, words
from tvq.commands import COMMANDS, Command, Options, program
from tvq.errors import InputError, explained, raise_at_interrupt

QUIET: Options = {"--quiet": {"action": "store_true", "help": "plain lines, as without a terminal"}}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tvq", description="Transformer-VQ. tvq COMMAND --help shows its options.", allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fields = config.listing(schema.Config(), config.base()).replace("%", "%%")
    for name, command in COMMANDS.items():
        epilog = "examples:\n" + textwrap.indent(textwrap.dedent(command.examples).strip(), "  ")
        if command.takes == "devices":
            epilog += f"\n\nevery field of the config can be set; these are the defaults:\n{fields}"
        added = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(**command.defaults)
        for flag, how in {**QUIET, **command.common, **command.own, **short_forms(command)}.items():
            added.add_argument(flag, **how)
    return top


def section(command: Command) -> list[dataclasses.Field]:
    """The fields that the command sets by their short form, `--split`: not how often `tvq train` does it."""
    if not command.section:
        return []
    return [
        f for f in dataclasses.fields(get_type_hints(schema.Config)[command.section]) if f.name != "every"
    ]


def short_forms(command: Command) -> Options:
    options = {}
    for field in section(command):
        if field.name not in command.common:  # as a positional argument
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.type is bool else {}
            doc = f"{field.metadata['doc']} (config.{command.section}.{field.name})".replace("%", "%%")
            options[f"--{field.name}"] = {"metavar": "VALUE", "help": doc, **switch}
    return options


def own_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that are the program's, by name."""
    names = [flag.removeprefix("--") for flag in COMMANDS[arguments.command].own]
    return {name: getattr(arguments, name) for name in names}


def refuse(text: str, arguments: argparse.Namespace, otherwise: str) -> NoReturn:
    """InputError: the command does not have this option."""
    close = difflib.get_close_matches(text.partition("=")[0].strip("-"), vars(arguments), n=1)
    raise InputError(f"{text} is not an option; {f'did you mean --{close[0]}?' if close else otherwise}")


def starting_config(arguments: argparse.Namespace) -> ConfigDict:
    """The config of the file, of the run in the workdir, or of the imported weights."""
    if arguments.config:
        return config.load(arguments.config)
    command = COMMANDS[arguments.command]
    if command.recorded_config:
        return config.recorded(program(command.recorded_config)(**own_options(arguments)))
    if arguments.workdir is None:
        raise InputError(f"tvq {arguments.command} needs a --config file or the --workdir of a run")
    path = epath.Path(arguments.workdir) / config.FILE
    if not path.exists():
        raise InputError(f"--workdir={arguments.workdir} holds no run: there is no {path}")
    return config.recorded(path)


def read_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> schema.Config:
    """The starting config with the fields that the command line sets."""
    draft, command = starting_config(arguments), COMMANDS[arguments.command]
    for text in overrides:
        name, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config.") or not equals:
            refuse(text, arguments, "fields are set as --config.section.field=value")
        config.override(draft, name, value)
    for field in section(command):
        value = getattr(arguments, field.name)
        if value is not None:
            config.override(draft, f"{command.section}.{field.name}", value)
    return config.build(draft)


def start(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Imports the program and runs it; returns its exit code."""
    command, own = COMMANDS[arguments.command], own_options(arguments)
    if command.takes == "options":
        for text in overrides:
            refuse(text, arguments, f"see tvq {arguments.command} --help")
        run = program(command.start)
        raise_at_interrupt()
        return run(**own)
    if command.at_step:
        arguments.workdir, own["at"] = paths.run_and_step(arguments.workdir)
    built = read_config(arguments, overrides)
    if command.takes == "config":
        source = arguments.config or arguments.workdir
        return program(command.start)(built, starting_config(arguments), source)
    on_devices = program("tvq.start.on_devices")
    return on_devices(command, built, arguments.workdir, arguments.cpu_devices, own)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code, or exits with it (0 done, 2 bad input, 3 diverged, 75 saved)."""
    words.begin()
    arguments, overrides = parser().parse_known_args(argv)
    if not COMMANDS[arguments.command].prints_result:
        sys.stdout = words.guarded(sys.stdout)
    with explained(words.tell):
        paths.expand_options(vars(arguments))
        if arguments.quiet:
            os.environ["TERM"] = "dumb"  # a terminal without escape codes, for this program and its children
        return start(arguments, overrides)


if __name__ == "__main__":
    sys.exit(main())
