"""An estimate as a page, several as a table."""

import math
from collections.abc import Mapping

from tvq.chips import GIB
from tvq.config import Config
from tvq.programs.plan.bound import Bound
from tvq.programs.plan.step import Estimate, TooLargeError

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


def verdict(found: Estimate) -> str:
    fits = "fits" if found.fits else NO
    needed = found.bytes_needed / GIB
    return f"{fits}: {needed:.2f} GiB of memory needed on a device, {found.chip.memory / GIB:.2f} available"


def page(c: Config, found: Estimate) -> str:
    """For the terminal."""
    n_device, n_step = math.prod(found.shape.values()), c.train.sequence_len // c.train.update_len
    lines = [
        f"{c.plan.topology}: {n_device} devices, mesh {shape(found)}; a step reads {found.n_token:,} tokens"
        f" in {n_step} update{'s' * (n_step > 1)}",
        f"parameters          {found.n_param:,}",
        verdict(found),
    ]
    lines += [f"  {size / GIB:9.3f} GiB  {name}" for name, size in found.memory.items()]
    lines += ["largest arrays of the program"]
    lines += [
        f"  {array.nbytes * n / GIB:9.3f} GiB  {f'{n} x ' if n > 1 else ''}{array.dtype}{list(array.shape)}"
        for array, n in found.largest
    ]
    n_token, lack = found.n_token / n_device, found.compiled / found.analytic - 1
    lines += [
        "work of a device, a token of its share",
        f"  {found.analytic / n_token / 1e9:9.3f} GFLOP needed, {found.compiled / n_token / 1e9:.3f} compiled"
        f" ({lack:+.1%})",
        f"  {found.traffic / n_token / 1e6:9.3f} MB to and from memory; {found.n_kernel:,} kernels a step",
    ]
    if found.links:
        lines.append("sent by a device, a step")
    lines += [
        f"  {sent / 1e9:9.3f} GB  {kind} along {axes}, {n:,} times"
        for (kind, axes), (n, sent) in sorted(found.links.items(), key=lambda item: -item[1][1])
    ]
    return "\n".join([*lines, *times(found)])


def times(found: Estimate) -> list[str]:
    whole = found.step_seconds
    n_device = math.prod(found.shape.values())
    use = found.analytic / found.chip.bfloat16 / whole
    return [
        f"compiled in {found.compile_seconds:.0f} s",
        f"a step takes at least {whole:.3g} s: {found.n_token / whole:,.0f} tokens/s,"
        f" {found.n_token / whole / n_device:,.0f} a device, at most {use:.0%} of the peak",
        *(
            f"  {share / whole:6.0%}  bound by {BOUND[name]}"
            for name, share in sorted(found.seconds.items(), key=lambda item: -item[1])
        ),
    ]


def shape(found: Estimate) -> str:
    return " ".join(f"{axis}={n}" for axis, n in found.shape.items() if n > 1 or axis == "devices")


def ranking(rows: Mapping[str, Estimate | Bound | str]) -> str:
    """Markdown: shapes that fit, the fastest first; those that may fit, not compiled; those that do not."""

    def order(name: str) -> tuple:
        found = rows[name]
        if isinstance(found, str):
            return 3, 0.0
        return 0 if isinstance(found, Estimate) and found.fits else 1 if found.fits else 2, found.step_seconds

    head = ["| mesh | fits | GiB a device | s a step | tokens/s | GB sent a device | bound by |"]
    head += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    return "\n".join(head + [row(name, rows[name]) for name in sorted(rows, key=order)])


def row(name: str, found: Estimate | Bound | str) -> str:
    if isinstance(found, str):
        return f"| {name} | {found} | | | | | |"
    memory = f"{found.bytes_needed / GIB:.2f} of {found.chip.memory / GIB:.2f}"
    if isinstance(found, Bound):
        fits = "not compiled" if found.fits else "no"
        return f"| {name} | {fits} | at least {memory} | at least {found.step_seconds:.3g} | | | |"
    sent = sum(sent for _, sent in found.links.values()) / 1e9
    bound = BOUND[max(found.seconds, key=lambda part: found.seconds[part])]
    speed = f"{found.step_seconds:.3g} | {found.n_token / found.step_seconds:,.0f}"
    return f"| {name} | {'yes' if found.fits else 'no'} | {memory} | {speed} | {sent:.2f} | {bound} |"
