"""What a compiled program costs, read from its optimised text: products, memory traffic, kernels, messages.

The compilers' own count takes the body of a loop once; here everything counts as often as it runs. The text
is HLO after all passes, where each instruction outside a fusion is one kernel.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tvq.programs.plan import hlo
from tvq.programs.plan.hlo import COLLECTIVES, FREE, SLICES, WAITED, Instruction, unknown

FREE_CALLS = {
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
}
SORTS = {"TopK", "__gpu$TopK", "__cub$DeviceRadixSort"}  # calls that multiply nothing


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


@dataclasses.dataclass(frozen=True)
class Program:
    """`computations` by name, each a list of instructions; the program is that named `entry`."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def read(cls, text: str) -> "Program":
        """InputError: a form that is not known."""
        return cls(*hlo.read(text))

    def run(self, name: str = "", n: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, times) of everything that runs, loops unrolled, outside fusions."""
        name = name or self.entry
        for one in self.computations[name].values():
            if one.op == "while":
                yield from self.run(one.called, n * self.n_trip(one))
            elif one.op in ("call", "async-start", "call-start"):
                yield from self.run(one.called, n)
            elif one.op == "conditional":
                raise unknown("`conditional`, of which one branch runs", one.name)
            elif one.op not in FREE | WAITED:
                yield name, one, n

    def n_trip(self, loop: Instruction) -> int:
        """How often a loop runs: ours count from 0 by 1 to the only number in the condition."""
        limits = set(self.constants(loop.attribute(r"condition=%([\w.\-]+)")))
        if len(limits) != 1:
            raise unknown(f"a `while` that ends at {sorted(limits) or 'no number'}", loop.name)
        return limits.pop()

    def constants(self, name: str) -> Iterator[int]:
        for one in self.computations[name].values():
            if one.op == "constant":
                yield int(one.inside)
            elif one.op == "fusion":
                yield from self.constants(one.called)

    def inner(self, one: Instruction) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
        """The instructions of a fusion, including nested ones; of any other instruction, itself."""
        for part in self.computations[one.called].values():
            if part.op == "fusion":
                yield from self.inner(part)
            else:
                yield self.computations[one.called], part

    def kernels(self) -> Iterator[Kernel]:
        for name, one, n in self.run():
            if one.op == "custom-call" and target(one) in FREE_CALLS:
                continue
            scope = self.computations[name]
            parts = list(self.inner(one)) if one.op == "fusion" else [(scope, one)]
            products = [(products_of(part, scope), precision(part, scope)) for scope, part in parts]
            flops = sum(count for count, _ in products)
            dearest = max(products, key=lambda product: product[0])[1]
            yield Kernel(one, n, flops, self.traffic(one, scope), dearest)

    def traffic(self, one: Instruction, scope: dict[str, Instruction]) -> int:
        """Bytes that a kernel reads and writes; of arrays sliced or updated in place, only that part."""
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
        """Bytes that a fused computation reads from its parameter."""
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
        """On a TPU it is part of each fusion that computes while it runs: it counts where it begins.

        A reduce-scatter may also be written as an all-reduce in one fusion with the slice that is kept.
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
    """The instructions that make the results, looking through changes of shape."""
    root = next(one for one in scope.values() if one.root)
    for one in [scope[name] for name in root.operands] if root.op == "tuple" else [root]:
        while one.op == "bitcast":
            one = scope[one.operands[0]]
        yield one


def source(scope: dict[str, Instruction], user: Instruction) -> str:
    """The array that is updated in place, or sliced."""
    one = scope[user.operands[0]]
    while one.op == "bitcast":
        one = scope[one.operands[0]]
    return one.name


def sliced(scope: dict[str, Instruction], one: Instruction) -> bool:
    """Whether a fused computation returns only a slice of an instruction."""
    return any(out.op == "dynamic-slice" and source(scope, out) == one.name for out in outputs(scope))


def dims_of(one: Instruction, pattern: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", one.attribute(pattern))]


def target(one: Instruction) -> str:
    """What a custom call calls."""
    return one.attribute(r'custom_call_target="([^"]*)"')


def products_of(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Multiplications and additions of a matrix product; those of a TPU are convolutions.

    InputError: it calls something unknown.
    """
    if one.op == "convolution":
        return convolution(one, scope)
    if one.op == "custom-call" and target(one).startswith("__cudnn$fmha"):
        return flash(one, scope)
    gemm = one.op == "custom-call" and "lhs_contracting_dimensions" in one.attributes
    if one.op == "custom-call" and not gemm and target(one) not in SORTS | FREE_CALLS:
        raise unknown(f"a `custom-call` of `{target(one)}`", f"{one.name}({one.inside}), {one.attributes}")
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
    """Batch dims of a product appear as dims that a window slides along, mostly over padding and gaps."""
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
    """Which devices exchange with one another.

    `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`, `mesh['a'=2,'b'=2] {'b'}`; all, if not stated.
    InputError: another form.
    """
    pairs = one.attribute(r"source_target_pairs=\{(\{.*?\})\}")
    listed = pairs or one.attribute(r"replica_groups=\{(\{.*?\})\}")
    if listed:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed)]
    numbers = np.arange(n_device)
    if grid := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?(?=,|$)", one.attributes
    ):
        n_group, _, shape, order = grid.groups()
        numbers = numbers.reshape([int(x) for x in shape.split(",")])
        if order:
            numbers = numbers.transpose([int(x) for x in order.split(",")])
        return [tuple(group) for group in numbers.reshape(int(n_group), -1).tolist()]
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{((?:'[^']*',?)+)\}(?=,|$)", one.attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        within = [list(sizes).index(name) for name in re.findall(r"'([^']*)'", axes[2])]
        across = [i for i in range(len(sizes)) if i not in within]
        numbers = numbers.reshape(list(sizes.values())).transpose(across + within)
        size = math.prod(list(sizes.values())[i] for i in within)
        return [tuple(group) for group in numbers.reshape(-1, size).tolist()]
    given = one.attribute(r"(replica_groups=.{0,60})")
    if given and not given.startswith("replica_groups={}"):
        raise unknown(f"`{given}`", one.name)
    return [tuple(range(n_device))]


def sent(kind: str, given: int, n: int) -> float:
    """Bytes that each of n devices sends, which hold `given` bytes each before the exchange."""
    share = {
        "all-gather": n - 1,  # each part is sent by every device but one
        "all-reduce": 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    return given * share[kind]
