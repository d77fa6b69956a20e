"""What a compiled program costs, read from its optimised text: products, memory traffic, kernels, messages.

The compilers' own count takes the body of a loop once; here everything counts as often as it runs. What is
read is HLO after all passes, where each instruction outside of a fusion is one kernel:

    %name = bf16[8,512]{1,0} fusion(%operand, ...), kind=kLoop, calls=%computation, metadata={...}
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

WIDTH = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
# Names for what is there already; no kernel runs.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency",
}  # fmt: skip
FREE_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
)
SLICES = {"slice", "dynamic-slice", "gather"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](~?)")
COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.+?) ([\w\-]+)\((.*?)\)(?:, (\w+=.*))?$")
# A layout that ends in S(1) lies in the fast memory of a TPU's core; what else a layout says does not matter.
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
        """That it costs to read or write it."""
        return 0 if self.fast else self.size


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: list[Array]  # its results
    operands: list[str]
    inside: str  # what stands in the parentheses
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        return self.attribute(r"(?:calls|to_apply|body)=%([\w.\-]+)")


class Kernel(NamedTuple):
    """One launch, `n` times a call of the program."""

    instruction: Instruction
    n: int
    flops: float
    nbytes: float
    precision: str  # of its products: bfloat16, float32, or highest


class Collective(NamedTuple):
    """A message, `n` times a call; `sent` bytes leave each device each time, in the best order known."""

    kind: str
    groups: list[tuple[int, ...]]  # devices, by their place in the mesh
    n: int
    sent: float


def arrays(text: str) -> list[Array]:
    found = ARRAY.findall(text)
    return [
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), bool(fast))
        for dtype, shape, fast in found
        if dtype in WIDTH
    ]


@dataclasses.dataclass(frozen=True)
class Program:
    """`computations` by name, each a list of instructions; the program is that named `entry`."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def read(cls, text: str) -> "Program":
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", {}
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif found := INSTRUCTION.match(LAYOUT.sub(lambda m: "~" if m[1] else "", line)):
                root, name, result, op, inside, attributes = found.groups()
                operands = re.findall(r"%([\w.\-]+)", inside)
                current[name] = Instruction(
                    name, op, arrays(result), operands, inside, attributes or "", bool(root)
                )
        assert entry, "no program in this text"
        return cls(computations, entry)

    def run(self, name: str = "", n: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, times) of all that runs, loops unrolled, outside of fusions."""
        name = name or self.entry
        for one in self.computations[name].values():
            if one.op == "while":
                yield from self.run(one.called, n * self.n_trip(one))
            elif one.op == "call" or (one.op == "async-start" and one.called):
                yield from self.run(one.called, n)
            elif one.op == "conditional":
                raise NotImplementedError(f"{one.name}: which branch runs is not known")
            elif one.op not in FREE and not one.op.endswith(("-done", "-update")):
                yield name, one, n

    def n_trip(self, loop: Instruction) -> int:
        """Ours count from 0 by 1 up to the one number that the condition holds."""
        limits = set(self.constants(loop.attribute(r"condition=%([\w.\-]+)")))
        assert len(limits) == 1, f"{loop.name} counts to {limits}"
        return limits.pop()

    def constants(self, name: str) -> Iterator[int]:
        for one in self.computations[name].values():
            if one.op == "constant":
                yield int(one.inside)
            elif one.op == "fusion":
                yield from self.constants(one.called)

    def inner(self, one: Instruction) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
        """The instructions of a fusion, through fusions within it; of any other, itself."""
        for part in self.computations[one.called].values():
            if part.op == "fusion":
                yield from self.inner(part)
            else:
                yield self.computations[one.called], part

    def kernels(self) -> Iterator[Kernel]:
        for name, one, n in self.run():
            if one.op == "custom-call" and one.attribute(r'custom_call_target="(\w+)"') in FREE_CALLS:
                continue
            scope = self.computations[name]
            parts = list(self.inner(one)) if one.op == "fusion" else [(scope, one)]
            products = [(products_of(part, scope), precision(part, scope)) for scope, part in parts]
            flops = sum(count for count, _ in products)
            dearest = max(products, key=lambda product: product[0])[1]
            yield Kernel(one, n, flops, self.traffic(one, scope), dearest)

    def traffic(self, one: Instruction, scope: dict[str, Instruction]) -> int:
        """Bytes that a kernel reads and writes: of what it slices or updates in place, only that part."""
        if one.op == "fusion":
            read = [self.read_of(one.called, i) for i in range(len(one.operands))]
            return sum(read) + sum(self.written(one.called))
        if one.op in SLICES:
            return 2 * one.nbytes
        if one.op == "dynamic-update-slice":
            return 2 * scope[one.operands[1]].nbytes
        if one.op == "scatter":
            return 3 * scope[one.operands[2]].nbytes
        if one.op in ("slice-start", "dynamic-slice-start"):
            return 2 * one.arrays[1].nbytes
        # Of an exchange the rest is its input, of a call work space.
        result = one.arrays[:1] if one.op.endswith("-start") or one.op == "custom-call" else one.arrays
        return sum(scope[name].nbytes for name in one.operands) + sum(array.nbytes for array in result)

    def read_of(self, name: str, index: int) -> int:
        """Bytes that a fused computation reads of its parameter."""
        scope = self.computations[name]
        parameter = next(p for p in scope.values() if p.op == "parameter" and p.inside == str(index))
        in_place = {
            source(scope, out) for out in outputs(scope) if out.op in ("dynamic-update-slice", "scatter")
        }

        def read(one: Instruction) -> int:
            total = 0
            for user in scope.values():
                if one.name not in user.operands:
                    continue
                if user.op in ("bitcast", "reshape"):
                    total += read(user)
                elif user.op in SLICES and user.operands[0] == one.name:
                    total += user.nbytes
                elif user.op == "fusion":
                    places = [i for i, operand in enumerate(user.operands) if operand == one.name]
                    total += sum(self.read_of(user.called, i) for i in places)
                elif not (parameter.name in in_place and user.operands[0] == one.name):
                    return parameter.nbytes
            return min(total, parameter.nbytes)

        return read(parameter)

    def written(self, name: str) -> Iterator[int]:
        """Bytes of each result of a fused computation."""
        scope = self.computations[name]
        for out in outputs(scope):
            if out.op == "dynamic-update-slice":
                yield scope[out.operands[1]].nbytes
            elif out.op == "scatter":
                yield 2 * scope[out.operands[2]].nbytes
            elif out.op == "fusion":
                yield from self.written(out.called)
            else:
                yield out.nbytes

    def collectives(self, n_device: int) -> Iterator[Collective]:
        """A TPU's is part of each fusion that computes while it is under way: it counts where it begins.

        And its reduce-scatter may be written as an all-reduce in one fusion with the slice that is kept.
        """
        seen: set[str] = set()
        for name, one, n in self.run():
            parts = self.inner(one) if one.op == "fusion" else [(self.computations[name], one)]
            for scope, part in parts:
                kind, chain = part.op.removesuffix("-start"), part.attribute(r"(channel_id=.*chain_id=\S+)")
                if kind in COLLECTIVES and chain not in seen:
                    seen |= {chain} - {""}
                    if kind == "all-reduce" and one.op == "fusion" and sliced(scope, part):
                        kind = "reduce-scatter"
                    groups = groups_of(part, n_device)
                    given = sum(array.size for operand in part.operands for array in scope[operand].arrays)
                    yield Collective(kind, groups, n, sent(kind, given, len(groups[0])))


def outputs(scope: dict[str, Instruction]) -> Iterator[Instruction]:
    """The instructions that make the results, seen through changes of shape."""
    root = next(one for one in scope.values() if one.root)
    for one in [scope[name] for name in root.operands] if root.op == "tuple" else [root]:
        while one.op == "bitcast":
            one = scope[one.operands[0]]
        yield one


def source(scope: dict[str, Instruction], user: Instruction) -> str:
    """What an update in place updates, or a slice is of."""
    one = scope[user.operands[0]]
    while one.op == "bitcast":
        one = scope[one.operands[0]]
    return one.name


def sliced(scope: dict[str, Instruction], one: Instruction) -> bool:
    """Whether a fused computation returns of an instruction but a slice."""
    return any(out.op == "dynamic-slice" and source(scope, out) == one.name for out in outputs(scope))


def dims_of(one: Instruction, pattern: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", one.attribute(pattern))]


def products_of(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Multiplications and additions of a matrix product; those of a TPU are convolutions."""
    if one.op == "convolution":
        return convolution(one, scope)
    if one.op == "custom-call" and "__cudnn$fmha" in one.attributes:
        return flash(one, scope)
    gemm = one.op == "custom-call" and "lhs_contracting_dimensions" in one.attributes
    if one.op != "dot" and not gemm:
        return 0
    contracted = dims_of(one, r"lhs_contracting_dim\w+\W*[{\[]([\d,\"]*)")
    left = scope[one.operands[0]].arrays[0].shape
    return 2 * math.prod(one.arrays[0].shape) * math.prod(left[i] for i in contracted)


def flash(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Causal attention of queries `[B,T,H,K]`: half of all scores, two products; its gradient five."""
    (B, T, H, K), V = scope[one.operands[0]].arrays[0].shape, scope[one.operands[2]].arrays[0].shape[3]
    return B * H * T**2 * (3 * K + 2 * V if "Backward" in one.attributes else K + V)


def convolution(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Batch dims of a product appear as dims that a window slides along, mostly over padding and holes."""
    left, right, out = re.split("_|->", one.attribute(r"dim_labels=([\w>-]+)"))
    shapes = [scope[name].arrays[0].shape for name in one.operands[:2]] + [one.arrays[0].shape]
    size = lambda letter, i: shapes[i][(left, right, out)[i].index(letter)]
    window = dict(re.findall(r"(\w+)=(\S+)", one.attribute(r"window=\{([^}]*)\}")))
    flops = 2 * size("b", 2) * size("f", 2) * size("i", 1)
    for axis in range(len(left) - 2):
        stride, spread, reach, front = (
            int(window[name].split("x")[axis].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        n_in, n_tap, n_out = (size(str(axis), i) for i in range(3))
        places = (o * stride + tap * reach - front for o in range(n_out) for tap in range(n_tap))
        flops *= sum(0 <= at <= (n_in - 1) * spread and at % spread == 0 for at in places)
    return flops


def precision(one: Instruction, scope: dict[str, Instruction]) -> str:
    if "operand_precision={highest" in one.attributes:
        return "highest"
    wide = any(scope[name].arrays[0].dtype == "f32" for name in one.operands[:2] if scope[name].arrays)
    return "float32" if wide else "bfloat16"


def groups_of(one: Instruction, n_device: int) -> list[tuple[int, ...]]:
    """Who exchanges with whom: `{{0,1},{2,3}}`, or `[2,2]<=[4]`, or `[2,2]<=[2,2]T(1,0)`."""
    pairs = one.attribute(r"source_target_pairs=\{(\{.*?\})\}")
    listed = pairs or one.attribute(r"replica_groups=\{(\{.*?\})\}")
    if listed:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed)]
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes)
    if not found:
        return [tuple(range(n_device))]
    n_group, _, shape, order = found.groups()
    numbers = np.arange(n_device).reshape([int(x) for x in shape.split(",")])
    if order:
        numbers = numbers.transpose([int(x) for x in order.split(",")])
    return [tuple(group) for group in numbers.reshape(int(n_group), -1).tolist()]


def sent(kind: str, given: int, n: int) -> float:
    """Bytes that leave each of n devices, which hold `given` bytes each before the exchange."""
    share = {
        "all-gather": n - 1,  # each part passes every device but one
        "all-reduce": 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    return given * share[kind]
