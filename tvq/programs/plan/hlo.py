"""Reading a compiler's text: HLO after all passes, computations of instructions.

    %name = bf16[8,512]{1,0} fusion(%operand, ...), kind=kLoop, calls=%computation, metadata={...}

An unknown form is rejected by name, because any reading of it would be a guess.
"""

import math
import re
from typing import NamedTuple

import jax

from tvq.errors import InputError

WIDTH = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
# Names for existing values; no kernel runs.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice", "gather"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Read their operands, write their results, and multiply no matrices.
SIMPLE = {
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan2", "atanh", "bitcast-convert", "broadcast",
    "cbrt", "ceil", "clamp", "compare", "complex", "concatenate", "convert", "copy", "cosine", "cosh",
    "count-leading-zeros", "divide", "erf", "exponential", "exponential-minus-one", "floor", "imag",
    "is-finite", "log", "log-plus-one", "logistic", "map", "maximum", "minimum", "multiply", "negate",
    "not", "or", "pad", "popcnt", "power", "real", "reduce", "reduce-precision", "reduce-window",
    "remainder", "reshape", "reverse", "rng", "rng-bit-generator", "rng-get-and-update-state",
    "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic",
    "shift-right-logical", "sign", "sine", "sinh", "sort", "sqrt", "stochastic-convert", "subtract", "tan",
    "tanh", "topk", "transpose", "xor",
}  # fmt: skip
# Started in one place and waited for in another, beside other work; the start counts.
BEGUN = {f"{op}-start" for op in ("async", "copy", "slice", "dynamic-slice", "fusion", "call", *COLLECTIVES)}
WAITED = {op.replace("-start", end) for op in BEGUN for end in ("-done", "-update")}
# For these, the parts that run, that are sliced and that multiply are distinguished below.
KNOWN = (
    FREE | SLICES | SIMPLE | BEGUN | WAITED | set(COLLECTIVES)
    | {"while", "call", "conditional", "fusion", "custom-call", "dot", "convolution"}
    | {"dynamic-update-slice", "scatter"}
)  # fmt: skip

ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](~?)")
COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.+?) ([\w\-]+)\((.*?)\)(?:, ([\w\-]+=.*))?$")
# A layout that ends in S(1) is in the fast memory of a TPU core; the rest of a layout does not matter.
LAYOUT = re.compile(r"(?<=\])\{[^{}]*?(S\(1\))?\}")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    fast: bool = False  # in memory whose traffic is free

    @property
    def size(self) -> int:
        """In bytes."""
        return WIDTH[self.dtype] * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that reading or writing it costs."""
        return 0 if self.fast else self.size


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: list[Array]  # its results
    operands: list[str]
    inside: str  # the text in the parentheses
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> str:
        return self.attribute(r"(?:calls|to_apply|body)=%([\w.\-]+)")


def unknown(form: str, where: str) -> InputError:
    return InputError(
        f"the compiler of jax {jax.__version__} writes {form}, whose cost is not known here; use a version of"
        f" jax that README.md lists as tested. The line is: {where.strip()[:200]}"
    )


def arrays(text: str, line: str) -> list[Array]:
    """The results named in an instruction's line. InputError: the size of one is not known."""
    result = []
    for dtype, shape, fast in ARRAY.findall(text):
        if dtype in ("token", "opaque"):
            continue
        if dtype not in WIDTH or not re.fullmatch(r"(\d+(,\d+)*)?", shape):
            raise unknown(f"`{dtype}[{shape}]`", line)
        result.append(Array(dtype, tuple(map(int, filter(None, shape.split(",")))), bool(fast)))
    return result


def read(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations by name, each with its instructions by name, and the name of the entry computation.

    InputError: a form that is not known.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None  # tables of source files and lines may follow
        elif current is not None and line.strip():
            one = instruction(line)
            current[one.name] = one
    if not entry:
        raise unknown("a program without an entry", text)
    return computations, entry


def instruction(line: str) -> Instruction:
    """InputError: it is not an instruction, or not a known one."""
    match = INSTRUCTION.match(LAYOUT.sub(lambda m: "~" if m[1] else "", line))
    if not match:
        raise unknown("a line that is not an instruction", line)
    root, name, result, op, inside, attributes = match.groups()
    if op not in KNOWN:
        raise unknown(f"`{op}`", line)
    if op == "fusion-start":  # it names and calls a fusion, which only runs beside other work
        op = "fusion"
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, op, arrays(result, line), operands, inside, attributes or "", bool(root))
