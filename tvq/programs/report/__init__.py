"""`tvq report`: one self-contained HTML page, and its pictures, about one run or several."""

import base64
import html
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from tvq import atomic, cluster, config, schema
from tvq.errors import InputError
from tvq.programs.report import figures, runs
from tvq.programs.report.runs import Run
from tvq.run import metrics
from tvq.run.records import Sample

__all__ = ["report", "start"]
FILE = "index.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
img { width: 100%; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid #eee; vertical-align: top; }
td:last-child { max-width: 26em; } summary { cursor: pointer; }
.samples, .samples td:last-child { width: 100%; max-width: none; }
.samples img { width: auto; min-width: 16em; max-width: 100%; image-rendering: pixelated; }
pre { background: #f6f6f6; padding: .7em; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def start(workdir: str, more: Sequence[str], output: str) -> int:
    """`tvq report`, with the options of the command line."""
    return report([workdir, *more], output)


def report(workdirs: Sequence[str], output: str) -> int:
    """Writes `output/index.html` and its pictures. InputError: there is no run, or no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("tvq report draws with matplotlib: pip install 'tvq[plots]'")
    chosen = runs.read(list(workdirs))
    folder = epath.Path(output or epath.Path(workdirs[0]) / "report")
    with cluster.writing("--output", folder):
        atomic.check(folder)
        drawn = [(title, draw(figure, folder / f"{name}.png")) for name, title, figure in drawings(chosen)]
        atomic.write(folder / FILE, page(chosen, drawn))
    with metrics.Console() as console:
        for run in chosen:
            for line in run.broken:
                console.say(f"left out: {line}")
        console.say(
            f"{folder / FILE}: {len(chosen)} {'run' if len(chosen) == 1 else 'runs'}, {len(drawn)} pictures"
        )
    return 0


def drawings(chosen: Sequence[Run]) -> list[tuple[str, str, Any]]:
    """(name of the file, title, figure) of every picture that these runs have data for."""
    made = [(name, title, picture(chosen)) for name, (title, picture) in figures.TOGETHER.items()]
    for i, run in enumerate(chosen):
        many = len(chosen) > 1
        made += [
            (f"{name}_{i + 1}" if many else name, f"{title}: {run.name}" if many else title, picture(run))
            for name, (title, picture) in figures.EACH.items()
        ]
    return [(name, title, figure) for name, title, figure in made if figure is not None]


def draw(figure: Any, path: epath.Path) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    atomic.write(path, content.getvalue())
    return content.getvalue()


def page(chosen: Sequence[Run], drawn: Sequence[tuple[str, bytes]]) -> str:
    names = ", ".join(run.name for run in chosen)
    parts = [f"<h1>{escape(names)}</h1>", facts(chosen)]
    for title, png in drawn:
        parts += [f"<h2>{escape(title)}</h2>", image(png, title)]
    parts += [samples(run) for run in chosen if run.samples]
    broken = [[run.name, line] for run in chosen for line in run.broken]
    if broken:
        parts += ["<h2>Left out</h2>", table(["run", "what cannot be read"], broken)]
    parts.append(settings(chosen))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(names)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def facts(chosen: Sequence[Run]) -> str:
    """A row for each run: how far it got, how good, how fast, and how long it took."""
    splits = sorted({split for run in chosen for split in run.splits()})
    of = runs.loss_unit(chosen)
    head = ["run", "updates", f"training, last bits a {of}", *(f"{split}, best" for split in splits)]
    lines = []
    for run in chosen:
        steps, losses = run.column(f"bits_per_{of}")
        scores = [min(run.column(f"bits_per_{of}", split)[1], default=None) for split in splits]
        spent, speeds = run.spent(), run.column("tokens_per_second")[1]
        lines.append(
            [run.name, f"{steps[-1]:,}" if len(steps) else "", f"{losses[-1]:.4f}" if len(losses) else ""]
            + ["" if score is None else f"{score:.4f}" for score in scores]
            + [f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if len(speeds) else ""]
            + (
                [f"{100 * metrics.goodput(spent):.0f} %", metrics.duration(sum(spent.values()))]
                if spent
                else ["", ""]
            )
        )
    return table([*head, "tokens/s, median", "goodput", "wall time"], lines)


def samples(run: Run) -> str:
    """A row for each step: what the model drew then."""
    lines = [f"<tr><td>{step:,}</td><td>{shown(drawn)}</td></tr>" for step, drawn in run.samples.items()]
    head = "<tr><th>updates</th><th>drawn then</th></tr>"
    body = "\n".join([head, *lines])
    return f'<h2>Samples: {escape(run.name)}</h2>\n<table class="samples">\n{body}\n</table>'


def shown(sample: Sample) -> str:
    return f"<pre>{escape(sample)}</pre>" if isinstance(sample, str) else image(sample, "images drawn")


def image(png: bytes, title: str) -> str:
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def settings(chosen: Sequence[Run]) -> str:
    """Where the configs differ, and all of them."""
    docs = config.docs()
    names = list(dict.fromkeys(name for run in chosen for name in run.config))
    if not names:
        return ""
    lines = [
        [name, *(repr(run.config.get(name, "absent")) for run in chosen), docs.get(name, "")]
        for name in names
    ]
    head = ["field", *(run.name for run in chosen), "meaning"]
    parts = ["<h2>Config</h2>"]
    if len(chosen) > 1:
        differing = [line for line in lines if len(set(line[1:-1])) > 1]
        parts += ["<p>Where the runs differ:</p>", table(head, differing)]
    else:
        default = {name: repr(value) for name, value in config.flatten(schema.Config()).items()}
        differing = [line for line in lines if default.get(line[0]) != line[1]]
        parts += ["<p>What is not at its default:</p>", table(head, differing)]
    parts.append(f"<details><summary>all {len(lines)} fields</summary>{table(head, lines)}</details>")
    return "\n".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = lambda tag, line: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
    rows = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<table>\n<tr>{cells('th', head)}</tr>\n{rows}\n</table>"


def escape(text: str) -> str:
    return html.escape(text)
