"""The program `tvq sample`: its prompts, their order, and where the texts go."""

import errno
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from tvq import atomic, cluster, sharding
from tvq import model as lm
from tvq.data import detokenize, optional
from tvq.data.vocabulary import END, Vocabulary, from_json
from tvq.errors import InputError
from tvq.rules import stop_strings
from tvq.run import draw, image_samples, metrics, records, restore, tensors
from tvq.run.draw import Prefix, Tell
from tvq.schema import Config, Mesh
from tvq.training.state import TrainState

# What is written to a folder.
RESULTS = re.compile(r"\d{4,}\.(txt|png)|sheet\.png")


def check(config: Config, image_size: int, placed: TrainState) -> None:
    """InputError if a run whose state is placed like this could not draw or write its samples."""
    if not config.sample.every or not config.model.carries_state:
        return
    if image_size:
        optional.load("PIL.Image")
    there = sharding.device_memory("bytes_limit")
    mib = lambda shape, x: math.prod(shape) * x.dtype.itemsize / 2**20
    held = sum(mib(x.sharding.shard_shape(x.shape), x) for x in jax.tree.leaves(placed))
    model = jax.tree.leaves(placed.weights)
    whole = sum(mib(x.shape, x) for x in model if not x.sharding.is_fully_replicated)
    if there is not None and whole and held + whole > there / 2**20:
        raise InputError(
            f"config.sample.every {config.sample.every} draws with the whole model on each device: its"
            f" {whole:,.0f} MiB do not fit beside {held:,.0f} MiB of the run into {there / 2**20:,.0f} MiB;"
            " use config.sample.every=0, and tvq sample where the model fits"
        )


def sampler(config: Config, vocabulary: Vocabulary, image_size: int, mesh: jax.sharding.Mesh) -> Callable:
    """`(weights, tell) -> records.Sample`: `sample.n_sample` texts that begin with `sample.prompt`.

    Or as many images, on one sheet. Each process draws the same, on one device, so that all can be stopped.
    """
    gather = jax.jit(
        lambda x: x, out_shardings=sharding.sharding(mesh, sharding.WHOLE)
    )  # takes all processes

    def here(x: jax.Array) -> jax.Array:
        return (x if x.is_fully_replicated else gather(x)).addressable_data(0)

    def draw_sample(weights: lm.Weights, tell: Tell) -> records.Sample:
        weights = jax.tree.map(here, weights)
        if image_size:
            nothing, options = [np.empty(0, np.int32)], drawing(config)
            drawn = image_samples.drawn(weights, config, image_size, nothing, options, tell)
            return image_samples.png(image_samples.sheet(drawn))
        before = draw.empty(config.model)
        made = texts(weights, vocabulary, config, before, [config.sample.prompt], tell)
        return "".join(shown(made, config.sample.n_sample))

    return draw_sample


def check_decodes(config: Config) -> None:
    if not config.model.carries_state:
        raise InputError(
            f"config.model.attention={config.model.attention} cannot decode; train with vq to draw samples"
        )


def drawing(config: Config) -> dict[str, Any]:
    """The options of `draw.chunks`, of texts."""
    return {
        "model": lm.for_platform(config.model, jax.devices()[0].platform),
        "length": config.sample.length,
        "temperature": config.sample.temperature,
        "p_nucleus": config.sample.nucleus,
        "min_p": config.sample.min_p,
        "penalty": config.sample.repetition_penalty,
        "end": None if config.sample.past_end else END,
    }


def encoded(vocabulary: Vocabulary, prompt: str) -> np.ndarray:
    """Ids; bytes of the command line that are not UTF-8 are surrogates in a prompt.

    InputError: the vocabulary cannot read them.
    """
    try:
        return vocabulary.encode(prompt.encode(errors="surrogateescape"))
    except UnicodeError as error:
        raise InputError(
            f"a prompt is not UTF-8, which a model of {vocabulary.name} needs: {prompt[:60]!r}"
        ) from error


def decoded(vocabulary: Vocabulary, ids_T: np.ndarray) -> str:
    return vocabulary.decode(ids_T).decode(errors="replace")


def over(vocabulary: Vocabulary, config: Config) -> draw.IsOver | None:
    """Whether a stop string has been drawn; None if there is none to look for."""
    stops = stop_strings(config.sample.stop)

    def is_over(prompt_T: np.ndarray, drawn_T: np.ndarray) -> bool:
        text = decoded(vocabulary, np.concatenate([prompt_T, drawn_T]))
        return detokenize.before_stop(text, len(decoded(vocabulary, prompt_T)), stops) != text

    return is_over if stops else None


def texts(
    weights: lm.Weights,
    vocabulary: Vocabulary,
    config: Config,
    before: Prefix,
    prompts: list[str],
    tell: Tell,
    *,
    stream: bool = False,
) -> Iterator[Iterable[str]]:
    """`n_sample` texts for each prompt, including the prompt, in pieces; each the same as if drawn alone.

    They are drawn side by side; with `stream` one after the other, and each piece comes once it is drawn.
    """
    given = [encoded(vocabulary, prompt) for prompt in prompts]
    options, key = drawing(config), jax.random.key(config.sample.seed)
    stops, is_over = stop_strings(config.sample.stop), over(vocabulary, config)
    if not stream:
        n_sample, batch_size = config.sample.n_sample, config.sample.batch_size
        drawn = draw.answers(
            weights,
            before,
            given,
            n_sample,
            key,
            batch_size=batch_size,
            tell=tell,
            is_over=is_over,
            **options,
        )
        for i, whole_T in enumerate(drawn):
            # Decoded with the prompt: its end may decide how the first piece is written.
            start = len(decoded(vocabulary, given[i // n_sample]))
            yield [detokenize.before_stop(decoded(vocabulary, whole_T), start, stops)]
        return
    for ids_T in given:
        prefix = draw.read_on(weights, before, ids_T, options["model"], tell)
        tell("")
        for number in range(config.sample.n_sample):
            more = draw.continuation(
                weights, prefix, number, key, prompts=[ids_T], is_over=is_over, **options
            )
            text = detokenize.stream(vocabulary, itertools.chain([ids_T], more))
            yield detokenize.until_stop(text, len(decoded(vocabulary, ids_T)), stops)


def read_prompts(path: epath.Path) -> list[str]:
    """The prompts in a file, or for `-` in standard input: one a line, in `.jsonl` its field `prompt`.

    InputError: there is none.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except OSError as error:
        raise InputError(f"--prompts={path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts={path} is not UTF-8: {error}") from error
    if not text:
        raise InputError(f"--prompts={path} is empty; write one prompt a line")
    lines = text.removesuffix("\n").split("\n")
    return [_prompt(path, i, line) for i, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines


def _prompt(path: epath.Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise InputError(f'--prompts={path}: line {number} must be {{"prompt": "..."}}, not {line[:60]}')
    return prompt


def read_document(path: epath.Path, vocabulary: Vocabulary) -> np.ndarray:
    """The ids of a file. InputError: it cannot be read, or not by this vocabulary."""
    try:
        return vocabulary.encode(path.read_bytes())
    except OSError as error:
        raise InputError(f"--document={path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--document={path} is not UTF-8, which a model of {vocabulary.name} needs:"
            f" {error.reason} at byte {error.start:,}"
        ) from error


def line(sample: records.Sample, folder: epath.Path) -> str:
    """A sample of a run for the terminal."""
    return f"sample in {folder}" + (f"\n{sample.rstrip()}" if isinstance(sample, str) else "")


def write_files(drawn: list[str], folder: epath.Path) -> str:
    """Writes a text file for each; returns the message about it."""
    for i, text in enumerate(drawn):
        atomic.write(folder / f"{i + 1:04}.txt", text)
    return f"{len(drawn)} texts in {folder}"


def keep(drawn: list[str], folder: epath.Path, log: cluster.Log) -> int:
    """Writes texts to a folder, or where that fails to standard output; returns the exit code."""
    try:
        told = write_files(drawn, folder)
    except OSError as error:
        log.say(f"tvq: --output={folder}: cannot write there ({error.strerror}); here are the texts")
        return deliver(shown([[text] for text in drawn], len(drawn)), log) or cluster.EXIT_FAILED
    return deliver([told + "\n"], log)


def prefix(
    weights: lm.Weights,
    vocabulary: Vocabulary,
    config: Config,
    say: Callable[[str], None],
    tell: Tell,
    document: str | None,
    save_state: str | None,
    from_state: str | None,
) -> Prefix:
    """What comes before every prompt: nothing, a saved state, a document, or both; saved if requested."""
    read_by = tensors.fingerprint(weights) if save_state or from_state else ""
    before = (
        draw.load(epath.Path(from_state), config.model, read_by) if from_state else draw.empty(config.model)
    )
    if document:
        ids = read_document(epath.Path(document), vocabulary)
        before = draw.read_on(weights, before, ids, drawing(config)["model"], tell)
        tell("")
    if save_state:
        with cluster.writing("--save_state", save_state):
            n_byte = draw.save(epath.Path(save_state), before, config.model, read_by)
        n_token = int(before.state.position) + len(before.rest_T)
        say(f"state after {n_token:,} tokens in {save_state}: {n_byte / 1e6:,.1f} MB, as after any number")
    return before


def check_output(folder: epath.Path) -> None:
    """InputError if the results cannot be written there, or would mix with older ones."""
    older = sorted(x.name for x in folder.iterdir() if RESULTS.fullmatch(x.name)) if folder.is_dir() else []
    if older:
        raise InputError(f"--output={folder} holds results already ({older[0]}); use another folder")
    with cluster.writing("--output", folder):  # now, not after everything is read and drawn
        atomic.check(folder)


def check_save_state(path: epath.Path, inputs: dict[str, str | None]) -> None:
    """InputError if a state cannot be written there, or would overwrite an input or another kind of file."""
    for option, other in inputs.items():
        if other and os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise InputError(f"--save_state={path} is the file of {option} too; use another name")
    if path.exists() and not draw.is_saved(path):
        raise InputError(f"--save_state={path} already exists and is not a saved state; use another name")
    with cluster.writing("--save_state", path.parent):
        atomic.check(path.parent)


def unused(folder: epath.Path) -> epath.Path:
    """The folder, or if it exists the first of FOLDER_2, FOLDER_3, ... that does not."""
    names = itertools.chain([folder.name], (f"{folder.name}_{i}" for i in itertools.count(2)))
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def deliver(pieces: Iterable[str], log: cluster.Log) -> int:
    """Writes texts to standard output as they come; returns the exit code.

    If the reader is gone (`| head`), nothing more is drawn, which is not an error.
    """
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except OSError as error:
        # Buffered text would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            log.say(f"tvq: standard output cannot be written ({error.strerror})")
            return cluster.EXIT_FAILED
    return 0


def shown(texts: Iterable[Iterable[str]], n: int) -> Iterator[str]:
    """The pieces of `n` texts for the terminal."""
    for i, pieces in enumerate(texts):
        yield f"--- sample {i + 1} of {n} ---\n" if n > 1 else ""
        yield from pieces
        yield "\n"


def sample(
    config: Config,
    workdir: epath.Path,
    place: cluster.Place,
    log: cluster.Log,
    *,
    prompts: str | None,
    output: str | None,
    stream: bool,
    document: str | None,
    save_state: str | None,
    from_state: str | None,
    at: int | None = None,
) -> int:
    """Continues prompts with the newest checkpoint, or with that of a step."""
    place.check_alone("sample")
    if stream and output:
        raise InputError("--stream writes to the terminal and --output to files; use one of them")
    check_decodes(config)
    if output:
        check_output(epath.Path(output))
    if save_state:
        inputs = {"--document": document, "--prompts": prompts, "--from_state": from_state}
        check_save_state(epath.Path(save_state), inputs)
    restored = restore.weights(config, workdir, sharding.make(Mesh(), jax.devices()[:1]), log.say, at)
    vocabulary = from_json(restored.data["vocabulary"])
    weights = restored.state.weights
    if restored.data["image_size"]:
        if stream or document or save_state or from_state or config.sample.prompt or config.sample.stop:
            raise InputError("this model draws images: it takes --prompts of images and --output, not text")
        folder = epath.Path(output) if output else unused(workdir / "samples" / f"step_{restored.step}")
        check_output(folder)
        size = restored.data["image_size"]
        halves = image_samples.upper_halves(epath.Path(prompts), size) if prompts else [np.empty(0, np.int32)]
        with metrics.Console() as console, cluster.writing("--output", folder):
            images = image_samples.drawn(weights, config, size, halves, drawing(config), telling(console))
            console.say(image_samples.write(images, folder))
        return 0
    asked = read_prompts(epath.Path(prompts)) if prompts else [config.sample.prompt]
    with metrics.Console() as console:
        tell = telling(console)
        before = prefix(weights, vocabulary, config, log.say, tell, document, save_state, from_state)
        drawn = texts(weights, vocabulary, config, before, asked, tell, stream=stream)
        if stream:
            return deliver(shown(drawn, len(asked) * config.sample.n_sample), log)
        whole = ["".join(pieces) for pieces in drawn]
    if output:
        return keep(whole, epath.Path(output), log)
    return deliver(shown([[text] for text in whole], len(whole)), log)


def telling(console: metrics.Console) -> Tell:
    """Shows progress on the live line."""
    return lambda line: console.progress(line, brief=True)
