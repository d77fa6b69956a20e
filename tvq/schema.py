"""The schema: every field of a run with its type, default, meaning and range, one dataclass a section."""

import dataclasses
import math
import pkgutil
from pathlib import Path
from typing import Any

# The attentions of `tvq.model`, and those of them that carry a state.
ATTENTIONS = {
    "vq": "linear time",
    "full": "exact and quadratic, the baseline of benchmarks",
    "flash": "the same by cuDNN's kernel on an NVIDIA GPU",
}
CARRYING = {"vq"}
# Each is a module, whose name this is.
OPTIMIZERS = tuple(
    sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "training/optimizers")])
    )
)
# wsd: warm-up, stable, decay.
SCHEDULES = ("cosine", "linear", "inv_sqrt", "constant", "wsd")
ENDING = ("cosine", "linear", "wsd")  # at a floor
DECAY_SHAPES = ("linear", "cosine", "sqrt")
# Ids that every vocabulary has: padding, the end of a document (it begins the next), an unknown piece.
PAD, END, UNKNOWN = 0, 1, 2


def field(default: Any, doc: str, at_least: float = -math.inf, below: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "at_least": at_least, "below": below})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    n_vocab: int = field(
        259, "token ids; bytes need 259 (three special ids, then the byte values)", at_least=4
    )
    n_layer: int = field(24, "layers; each is two gated attention units", at_least=1)
    n_head: int = field(1, "heads", at_least=1)
    d_model: int = field(768, "width of the residual stream", at_least=1)
    d_k: int = field(128, "key width of a head", at_least=1)
    d_v: int = field(1536, "value width of a head", at_least=1)
    n_code: int = field(512, "codewords of a head", at_least=1)
    block_len: int = field(512, "tokens of one attention block", at_least=1)
    mem_len: int = field(512, "tokens before a block that are attended to exactly", at_least=1)
    attention: str = field("vq", "; ".join(f"{name}: {doc}" for name, doc in ATTENTIONS.items()))
    n_parallel: int = field(
        0,
        "blocks of all sequences of a device that vq attention computes at once; 0: chosen for the device",
        at_least=0,
    )
    attend_across_documents: bool = field(
        False,
        "attend to earlier documents of the sequence, as the paper does; off: window and cache end there",
    )
    agg_cache: bool = field(True, "attend to the tokens before the window through the compressive cache")
    grad_thru_cache: bool = field(True, "let gradients pass from block to block within an update")
    pe_abs: bool = field(False, "add absolute sinusoidal positions to the embedding")
    pe_lam: float = field(100_000.0, "longest wavelength of the sinusoids, over 2 pi")
    e_tie: bool = field(False, "use the embedding table as output projection")
    e_preln: bool = field(False, "normalise before the output projection")
    e_scale: float = field(1.0, "factor on the logits")
    p_dropemb: float = field(0.0, "dropout on the embedding", at_least=0, below=1)
    p_dropsin: float = field(0.0, "dropout on the sinusoids of relative positions", at_least=0, below=1)
    p_dropres: float = field(0.0, "dropout on the output of each gated unit", at_least=0, below=1)
    p_droplyr: float = field(0.0, "probability that a sequence skips a gated unit", at_least=0, below=1)
    c_gamma: float = field(0.99, "decay of the codebook's moving average", at_least=0, below=1)
    c_beta: float = field(1e-4, "weight of the commitment loss", at_least=0)
    revive_codes: int = field(
        0, "updates after which a code that no key chose is seeded with a recent key; 0: never", at_least=0
    )
    remat: str = field(
        "names", "what a unit keeps for the backward pass: all, names (the costly parts) or nothing"
    )
    dtype: str = field("float32", "dtype of activations: float32, bfloat16 or float64")
    param_dtype: str = field("float32", "dtype of parameters")

    @property
    def carries_state(self) -> bool:
        """Whether attention carries a state from call to call, so that it can read in pieces and decode."""
        return self.attention in CARRYING

    def cuts_heads(self, n_part: int) -> bool:
        """Whether units are cut into parts by their heads; otherwise by their values."""
        return self.n_head % n_part == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    source: str = field(
        "stdlib", "stdlib (the running Python's library, nothing to download), text, or tokens"
    )
    path: str = field("", "file or folder of text, for source=text; prepared folder, for source=tokens")
    mix: str = field(
        "", "FOLDER:WEIGHT,FOLDER:WEIGHT: prepared folders with their shares, instead of source and path"
    )
    cache: str = field("", "folder for prepared tokens and compiled programs; empty: the user's cache folder")
    workers: int = field(0, "processes that read ahead; 0 reads in threads of this one", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str = field("adamw", f"one of {', '.join(OPTIMIZERS)}")
    lr_max: float = field(4e-4, "learning rate at the end of warm-up", at_least=0)
    lr_rest: float = field(
        0.0, "the same of all that is not a kernel of a unit: tables, vectors, output; 0: lr_max", at_least=0
    )
    schedule: str = field("cosine", f"after linear warm-up, one of {', '.join(SCHEDULES)}")
    n_warmup_step: int = field(10_000, "updates of warm-up", at_least=0, below=2**31)
    n_max_step: int = field(
        125_000, "update at which cosine, linear and wsd reach their floor", at_least=1, below=2**31
    )
    floor: float = field(0.1, "share of the learning rate that is left there; may be 0", at_least=0)
    n_decay_step: int = field(
        0, "updates of the decay at the end of wsd; 0: a fifth of n_max_step", at_least=0, below=2**31
    )
    decay_shape: str = field("linear", f"of wsd, one of {', '.join(DECAY_SHAPES)}")
    grad_clip: float = field(0.1, "largest global norm of the gradient; 0 does not clip", at_least=0)
    skip_sigma: float = field(
        0.0,
        "leave out an update whose loss or gradient norm is so many standard deviations above the mean of the"
        " skip_window before it; 0: never",
        at_least=0,
    )
    skip_window: int = field(128, "updates that skip_sigma looks back on", at_least=2, below=2**20)
    wd_lam: float = field(2e-4, "weight decay: the share that each update takes away", at_least=0)
    wd_times_rate: bool = field(
        False, "multiply wd_lam by the rate of the update; off: a share whatever the rate, as in the paper"
    )

    @property
    def n_decay(self) -> int:
        """The updates of the decay of wsd."""
        return self.n_decay_step or min(max(self.n_max_step // 5, 1), self.n_max_step - self.n_warmup_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    replica: int = field(1, "whole copies of the model, on slices joined by a slow network")
    devices: int = field(-1, "data-parallel devices; -1 (for one of the four) takes all that are left")
    sequence: int = field(1, "contiguous parts that the tokens of an update are cut into")
    tensor: int = field(1, "parts of the heads, or of the value width where there is one head")
    shard_params: bool = field(False, "cut parameters and optimizer state over mesh.devices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = field(125_000, "parameter updates of the run", at_least=1, below=2**31)
    global_batch_size: int = field(128, "sequences of a batch, over all devices", at_least=1)
    sequence_len: int = field(8192, "tokens of a training sequence", at_least=1)
    update_len: int = field(2048, "tokens of a sequence that one parameter update sees", at_least=1)
    segment_len: int = field(
        0,
        "tokens of an update held in memory at a time, at the cost of a second forward; 0: all of them",
        at_least=0,
    )
    accumulate: int = field(
        1, "parts of its sequences that a device reads one after the other, to hold one at a time", at_least=1
    )
    z_loss: float = field(
        0.0,
        "weight of the mean square of log Z, the normaliser of the output's softmax, in the loss",
        at_least=0,
    )
    seed: int = field(0, "decides initial parameters, data order and dropout", at_least=0, below=2**32)
    reproducible: bool = field(
        False,
        "let GPUs use only kernels that repeat bitwise, as CPUs and TPUs always do, and add up a batch in an"
        " order that fewer or more devices do not change (docs/mesh.md); at a cost (tvq bench train)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    every: int = field(1000, "updates between evaluations while training; 0: never", at_least=0)
    split: str = field("validation", "train, validation or test")
    carry: bool = field(
        False, "read each document with all of it as context, not train.sequence_len tokens from nothing"
    )
    batch_size: int = field(
        0, "sequences of an evaluation batch; 0 takes train.global_batch_size", at_least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    length: int = field(8192, "tokens of a sequence of the recall probe, rounded up to pieces", at_least=1)
    n_sequence: int = field(8, "sequences of the probe", at_least=1)
    seed: int = field(0, "decides the pairs and the questions", at_least=0, below=2**32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    every: int = field(
        1000,
        "updates between samples while training, by the whole model on each device; 0: never",
        at_least=0,
    )
    prompt: str = field("", "text to continue")
    n_sample: int = field(1, "continuations to draw", at_least=1)
    batch_size: int = field(16, "continuations drawn side by side", at_least=1)
    length: int = field(256, "tokens to draw for each, at most", at_least=1)
    past_end: bool = field(False, "when the model ends a text, keep drawing into the next; off: stop there")
    temperature: float = field(1.0, "divides the logits; 0 always takes the likeliest token", at_least=0)
    nucleus: float = field(0.9, "draw from the likeliest tokens that hold this much probability")
    min_p: float = field(
        0.0, "draw no token less likely than this share of the likeliest; 0: any", at_least=0
    )
    repetition_penalty: float = field(
        1.0,
        "multiplies the log-probability of each token in the prompt or drawn (not of a document); 1: none",
        at_least=1,
    )
    stop: str = field(
        "", 'end a text before this string, once drawn; several as a JSON list: ["a", "b"]; empty: none'
    )
    seed: int = field(0, "decides the draws", at_least=0, below=2**32)


BENCHES = ("train", "attention", "decode", "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    kind: str = field("train", f"what to measure: {', '.join(BENCHES)}")
    lengths: str = field("2048,8192", "tokens of a sequence, and of an update, for train and attention")
    n_token: int = field(0, "tokens of a step, the same at each length; 0: the largest length", at_least=0)
    formulations: str = field(
        "auto,serial,all,full",
        "vq by model.n_parallel: auto (0), serial (1), all; full; flash; auto:nothing sets model.remat",
    )
    contexts: str = field("1024,10240,102400", "tokens before those that decode measures")
    batch_sizes: str = field("1,8", "sequences that decode works on at once")
    n_draw: int = field(64, "tokens that one call of decode draws", at_least=1)
    rounds: int = field(5, "times that each case is timed, in turn", at_least=1)
    seconds: float = field(
        0.0, "time limit: no case is added after 60 % of it and no round begun after it; 0: none", at_least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    topology: str = field("", "machine to plan for: a TPU slice (v5e:4x4), or GPUs of one host (h200:8)")
    sweep: bool = field(False, "rank the shapes of the mesh")
    n_compile: int = field(8, "shapes that a sweep compiles at most, the most promising first", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = field(1000, "updates between checkpoints", at_least=1)
    keep: int = field(3, "latest checkpoints kept", at_least=1)
    keep_every: int = field(
        10_000, "checkpoints at multiples of this update are kept for good; 0: none", at_least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    every: int = field(100, "updates between rows of metrics.jsonl", at_least=1)
    wandb: str = field("", "project of Weights & Biases to log to (extra wandb); empty: none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    steps: str = field("", "updates FIRST:LAST whose trace is written to profile/; empty: none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    coordinator: str = field(
        "", "HOST:PORT of process 0 (PORT + 1 is used too); empty: taken from the scheduler"
    )
    n_process: int = field(0, "processes of the run; 0: taken from the scheduler, or one", at_least=0)
    process_id: int = field(-1, "number of this process; -1: taken from the scheduler", at_least=-1)
    local_devices: int = field(
        0, "devices that each process must have; 0: what the scheduler granted", at_least=0
    )
    start_timeout: float = field(
        300.0, "seconds to wait until all processes have joined", at_least=1, below=10**9
    )
    step_timeout: float = field(
        600.0, "seconds without progress until the watchdog ends the process", at_least=1, below=10**9
    )
    compile_timeout: float = field(
        3600.0, "the same for the first step, which compiles, and for restoring", at_least=1, below=10**9
    )
    silence_timeout: float = field(
        60.0, "seconds without a sign of life until a process counts as lost", at_least=1, below=10**9
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    recall: Recall = Recall()
    sample: Sample = Sample()
    bench: Bench = Bench()
    plan: Plan = Plan()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    profile: Profile = Profile()
    cluster: Cluster = Cluster()


# What `tvq prepare` reads.
RAW = {
    "enwik8": "enwik8.zip, .gz or unpacked",
    "pg19": "folders train, validation and test of .txt, or tables (jsonl, parquet) of those names",
    "imagenet64": "batch files (.npz, pickled) or folders of images whose names begin with train and val",
    "text": "a file, a folder of files, or tables; also .gz, .zst and .zip",
    "images": "a folder of images",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """The options of `tvq prepare`, which has no config."""

    kind: str = field("text", "what the input is")
    input: str = field("", "the raw file or folder; with --download, where it goes")
    output: str = field("", "the folder to make")
    download: bool = field(False, "fetch the input first, if it is not there (enwik8, pg19)")
    url: str = field("", "where to fetch it from; empty: its public address")
    vocabulary: str = field("", "bytes or sentencepiece; empty: sentencepiece for pg19, otherwise bytes")
    model: str = field("", "a SentencePiece model to use; empty: one is trained on the training split")
    pieces: int = field(32_000, "pieces of the model to train", at_least=4)
    sample: int = field(
        1_000_000_000, "bytes of the training split to train it on, which must fit in memory", at_least=1
    )
    column: str = field("text", "column or key of the text in tables")
    split: str = field(
        "",
        "of a folder: names, as its names tell; hash, by a hash of each name; empty: names where they tell",
    )
    size: int = field(64, "pixels on a side that images are scaled and cropped to", at_least=1)
    n_train: int = field(
        0,
        "bytes (enwik8, a text file) or images (imagenet64) that train; 0: as published, or 90 % of a file",
        at_least=0,
    )
    threads: int = field(0, "threads that encode; 0: one for each core", at_least=0)

    @property
    def in_pieces(self) -> bool:
        """Whether the vocabulary is SentencePiece."""
        default = "sentencepiece" if self.kind == "pg19" or self.model else "bytes"
        return (self.vocabulary or default) == "sentencepiece"
