"""An estimate as a page, several as a table."""

import math
from collections.abc import Mapping

from tvq.chips import GIB
from tvq.programs.plan.bound import Bound
from tvq.programs.plan.step import Estimate, TooLargeError
from tvq.schema import Config

BOUND = {
    "products": "matrix products",
    "memory": "memory traffic",
    "links": "links between devices",
    "launches": "launches of kernels",
}
NO = "does not fit"


def too_large(error: TooLargeError) -> str:
    return f"{NO}: {lacking(*error.args)}"


def lacking(needed: str, available: str) -> str:
    return f"{needed} of memory needed on a device, {available} available"


def verdict(cost: Estimate) -> str:
    fits = "fits" if cost.fits else NO
    needed = cost.bytes_needed / GIB
    return f"{fits}: {needed:.2f} GiB of memory needed on a device, {cost.chip.memory / GIB:.2f} available"


def page(config: Config, cost: Estimate) -> str:
    """For the terminal."""
    n_device, n_step = math.prod(cost.shape.values()), config.train.sequence_len // config.train.update_len
    lines = [
        f"{config.plan.topology}: {n_device} devices, mesh {shape(cost)}; a step reads"
        f" {cost.n_token:,} tokens in {n_step} update{'s' * (n_step > 1)}",
        f"parameters          {cost.n_param:,}",
        verdict(cost),
    ]
    lines += [f"  {size / GIB:9.3f} GiB  {name}" for name, size in cost.memory.items()]
    lines += ["largest arrays of the program"]
    lines += [
        f"  {array.nbytes * n / GIB:9.3f} GiB  {f'{n} x ' if n > 1 else ''}{array.dtype}{list(array.shape)}"
        for array, n in cost.largest
    ]
    n_token, lack = cost.n_token / n_device, cost.compiled / cost.analytic - 1
    lines += [
        "work of a device, a token of its share",
        f"  {cost.analytic / n_token / 1e9:9.3f} GFLOP needed, {cost.compiled / n_token / 1e9:.3f} compiled"
        f" ({lack:+.1%})",
        f"  {cost.traffic / n_token / 1e6:9.3f} MB to and from memory; {cost.n_kernel:,} kernels a step",
    ]
    if cost.links:
        lines.append("sent by a device, a step")
    lines += [
        f"  {sent / 1e9:9.3f} GB  {kind} along {axes}, {n:,} times"
        for (kind, axes), (n, sent) in sorted(cost.links.items(), key=lambda item: -item[1][1])
    ]
    return "\n".join([*lines, *times(cost)])


def times(cost: Estimate) -> list[str]:
    whole = cost.step_seconds
    n_device = math.prod(cost.shape.values())
    use = cost.analytic / cost.chip.bfloat16 / whole
    return [
        f"compiled in {cost.compile_seconds:.0f} s",
        f"a step takes at least {whole:.3g} s: {cost.n_token / whole:,.0f} tokens/s,"
        f" {cost.n_token / whole / n_device:,.0f} a device, at most {use:.0%} of the peak",
        *(
            f"  {share / whole:6.0%}  bound by {BOUND[name]}"
            for name, share in sorted(cost.seconds.items(), key=lambda item: -item[1])
        ),
    ]


def shape(cost: Estimate) -> str:
    return " ".join(f"{axis}={n}" for axis, n in cost.shape.items() if n > 1 or axis == "devices")


def ranking(rows: Mapping[str, Estimate | Bound | str]) -> str:
    """Markdown: shapes that fit, the fastest first; those that may fit, not compiled; those that do not."""

    def order(name: str) -> tuple:
        entry = rows[name]
        if isinstance(entry, str):
            return 3, 0.0
        return 0 if isinstance(entry, Estimate) and entry.fits else 1 if entry.fits else 2, entry.step_seconds

    head = ["| mesh | fits | GiB a device | s a step | tokens/s | GB sent a device | bound by |"]
    head += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    return "\n".join(head + [row(name, rows[name]) for name in sorted(rows, key=order)])


def row(name: str, entry: Estimate | Bound | str) -> str:
    if isinstance(entry, str):
        return f"| {name} | {entry} | | | | | |"
    memory = f"{entry.bytes_needed / GIB:.2f} of {entry.chip.memory / GIB:.2f}"
    if isinstance(entry, Bound):
        fits = "not compiled" if entry.fits else "no"
        return f"| {name} | {fits} | at least {memory} | at least {entry.step_seconds:.3g} | | | |"
    sent = sum(sent for _, sent in entry.links.values()) / 1e9
    bound = BOUND[max(entry.seconds, key=lambda part: entry.seconds[part])]
    speed = f"{entry.step_seconds:.3g} | {entry.n_token / entry.step_seconds:,.0f}"
    return f"| {name} | {'yes' if entry.fits else 'no'} | {memory} | {speed} | {sent:.2f} | {bound} |"
