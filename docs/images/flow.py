"""Draws flow.svg, the picture of docs/architecture.md: from checkpoint to Parquet, and one operand up close.

    python docs/images/flow.py

The bits of the operand are computed, so that the picture shows what a data file would hold.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT = 1200, 896
# The vector drawn up close, and the threshold that it meets.
X = np.array([0.9, -0.1, 0.2, -1.4, 0.0, 0.6, -0.3, 2.1, 0.1, -0.7], np.float16)
T = 0.5

# Colours by class, for light pages and for dark ones; the picture brings its own background.
LIGHT = {
    "page": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#1c2128",
    "soft": "#57606a",
    "line": "#6e7781",
    "step": "#dcedff",
    "edge": "#0a64cc",
    "file": "#fff6d6",
    "rim": "#a87400",
    "kept": "#ffb77c",
    "none": "#e6eaee",
}
DARK = {
    "page": "#0d1117",
    "panel": "#161b22",
    "ink": "#e8edf3",
    "soft": "#a3adb8",
    "line": "#8b949e",
    "step": "#12304f",
    "edge": "#58a6ff",
    "file": "#33290d",
    "rim": "#d8a72f",
    "kept": "#a4501a",
    "none": "#2a313a",
}


def style(colours: dict[str, str]) -> str:
    """CSS rules of a palette."""
    c = colours
    return (
        f".page{{fill:{c['page']}}}.panel{{fill:{c['panel']};stroke:{c['line']}}}.zoom{{fill:{c['panel']}}}"
        f".step{{fill:{c['step']};stroke:{c['edge']}}}.file{{fill:{c['file']};stroke:{c['rim']}}}"
        f".kept{{fill:{c['kept']};stroke:{c['line']}}}.none{{fill:{c['none']};stroke:{c['line']}}}"
        f".bare{{fill:{c['page']};stroke:{c['line']}}}.wire{{fill:none;stroke:{c['line']}}}"
        f".thin{{fill:none;stroke:{c['line']};stroke-dasharray:3 4}}.tip{{fill:{c['line']}}}"
        f"text{{fill:{c['ink']}}}.soft{{fill:{c['soft']}}}.edge{{fill:{c['edge']}}}"
    )


class Picture:
    """Collects SVG elements."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, element: str) -> None:
        """Append an element."""
        self.parts.append(element)

    def rect(self, x: float, y: float, w: float, h: float, kind: str, radius: float = 7) -> None:
        """A box."""
        self.add(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """A line of text; `kind` may hold b (bold), m (monospace), s (small), l (large) and colour classes."""
        self.add(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def heading(self, x: float, y: float, head: str, words: str, kind: str = "b l") -> None:
        """A bold word and what is said of it, in one line."""
        spans = f'<tspan class="{kind}">{escape(head)}</tspan> <tspan class="soft">{escape(words)}</tspan>'
        self.add(f'<text class="s" x="{x:g}" y="{y:g}">{spans}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line with a tip at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = np.sign(x1 - x0), np.sign(y1 - y0)
        path = " L".join(f"{x:g} {y:g}" for x, y in (*points[:-1], (x1 - 6 * dx, y1 - 6 * dy)))
        self.add(f'<path class="wire" d="M{path}"/>')
        back, side = (x1 - 10 * dx, y1 - 10 * dy), (5 * dy, 5 * dx)
        corners = [(x1, y1), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1])]
        self.add(f'<path class="tip" d="M{" L".join(f"{x:g} {y:g}" for x, y in corners)} Z"/>')

    def step(self, x: float, y: float, w: float, h: float, title: str, lines: Sequence[str], package: str) -> None:
        """A step of the pipeline, with what it does and the package that holds it."""
        self.rect(x, y, w, h, "step")
        middle = x + w / 2
        self.text(middle, y + 24, title, "b l")
        for n, line in enumerate(lines):
            self.text(middle, y + 43 + 17 * n, line, "s")
        self.text(middle, y + h - 9, package, "m s edge")

    def file(self, x: float, y: float, w: float, h: float, title: str, lines: Sequence[str] = ()) -> None:
        """Something on the disk: a sheet with a folded corner."""
        fold = 13
        self.add(
            f'<path class="file" d="M{x:g} {y:g} h{w - fold:g} l{fold} {fold} v{h - fold:g} h{-w:g} Z '
            f'M{x + w - fold:g} {y:g} v{fold} h{fold}"/>'
        )
        top = y + h / 2 + 5 - 8.5 * len(lines)
        self.text(x + w / 2, top, title, "b")
        for n, line in enumerate(lines):
            self.text(x + w / 2, top + 17 + 16 * n, line, "s soft")

    def cells(self, x: float, y: float, size: tuple[float, float], words: Sequence[str], kinds: Sequence[str]) -> None:
        """A row of cells with a word in each."""
        w, h = size
        for n, (word, kind) in enumerate(zip(words, kinds, strict=True)):
            self.rect(x + n * w, y, w, h, kind, 0)
            self.text(x + (n + 0.5) * w, y + h / 2 + 5, word, "m s" if kind != "none" else "m s soft")


def pipeline(p: Picture) -> None:
    """The upper half: steps, and the files between them."""
    p.rect(24, 22, 1152, 40, "panel")
    study = "is a study: models, runs, methods. Snakemake runs a rule for each step, which is one call of sparsetrace."
    p.heading(44, 47, "config.yaml", study, "b m")
    p.text(1156, 47, "study/  cli/", "m s edge", "end")
    inputs = (("checkpoint", ["Hugging Face"]), ("text", ["for calibration"]), ("prompts", []))
    for y, (name, lines) in zip((86, 196, 306), inputs, strict=True):
        p.file(24, y, 118, 86, name, lines)
        p.arrow((142, y + 43), (178, y + 43))
    p.step(178, 86, 166, 86, "1  convert", ["weights by site"], "model/")
    p.step(178, 196, 166, 86, "2  calibrate", ["exact histograms"], "calibration/")
    p.step(178, 306, 166, 86, "3  split", ["number, group, shard"], "generation/")
    files = (("model", ["weights, sites"]), ("thresholds", ["one per matrix"]), ("shards", ["lists of groups"]))
    for y, (name, lines) in zip((86, 196, 306), files, strict=True):
        p.arrow((344, y + 43), (380, y + 43))
        p.file(380, y, 124, 86, name, lines)
        p.arrow((504, y + 43), (548, y + 43))
    # the dense model is what calibration runs
    p.arrow((442, 172), (442, 184), (261, 184), (261, 196))
    p.rect(556, 94, 184, 306, "step")
    p.rect(548, 86, 184, 306, "step")
    p.text(640, 114, "3  generate", "b l")
    p.text(640, 134, "one job for each shard", "s soft")
    inner = (
        ("plan", "what is fed when"),
        ("engine", "one group at a time"),
        ("ring", "operands of a block"),
        ("seal", "a group is whole"),
    )
    for n, (name, what) in enumerate(inner):
        y = 148 + 52 * n
        p.rect(562, y, 156, 42, "bare", 5)
        p.text(640, y + 18, name, "b s")
        p.text(640, y + 34, what, "s soft")
        if n:
            p.arrow((640, y - 10), (640, y))
    p.text(640, 382, "generation/", "m s edge")
    p.arrow((740, 239), (776, 239))
    p.file(776, 196, 104, 86, "dump", ["raw blocks"])
    p.arrow((880, 239), (916, 239))
    p.rect(924, 204, 124, 86, "step")
    p.step(916, 196, 124, 86, "4  pack", ["sort, encode"], "packing/")
    p.arrow((1048, 239), (1070, 239))
    p.file(1070, 196, 106, 86, "workload", ["Parquet"])
    for n, line in enumerate(
        (
            "A group of sequences is run, sealed and resumed whole.",
            "A backend runs the model: torch, the reference,",
            "or triton, which reads only the weight rows it needs.",
        )
    ):
        p.text(776, 108 + 20 * n, line, "s soft", "start")
    p.arrow((1123, 282), (1123, 330))
    p.rect(776, 330, 400, 62, "panel")
    p.text(976, 354, "read, verify, measure, export, make again", "b s")
    p.text(976, 379, "workload/  tools/", "m s edge")


def operand(p: Picture) -> None:
    """The lower half: what happens to the vector of one token at one site."""
    top, left, cell = 436, 250, 40
    p.add(f'<path class="zoom" d="M548 400 L740 400 L1176 {top} L24 {top} Z"/>')
    p.rect(24, top, 1152, HEIGHT - top - 22, "panel")
    p.add(f'<path class="thin" d="M548 400 L24 {top + 7} M740 400 L1176 {top + 7}"/>')
    p.text(48, top + 34, "One operand up close: layer 2, matrix down, token 17", "b l", "start")
    keep = np.abs(X) > np.float16(T)
    end, middle = left + cell * len(X), left + cell * len(X) / 2
    kinds = ["kept" if k else "none" for k in keep]
    y_x, y_mask, y_operand, y_ring = (top + below for below in (70, 154, 238, 326))

    def columns(start: float, stop: float) -> None:
        """Lines from each entry to the one below it."""
        for n in range(len(X)):
            p.add(f'<path class="wire" d="M{left + (n + 0.5) * cell:g} {start:g} V{stop:g}"/>')

    p.step(48, y_x - 19, 156, 72, "producer", ["or norm, or attention"], "SiLU(gate) * up")
    p.arrow((204, y_x + 17), (left, y_x + 17))
    p.cells(left, y_x, (cell, 34), [f"{v:g}" for v in X.astype(float).round(1)], ["bare"] * len(X))
    p.text(end + 10, y_x + 15, "x, rounded", "s soft", "start")
    p.text(end + 10, y_x + 31, "as it is stored", "s soft", "start")
    columns(y_x + 34, y_mask)

    p.step(48, y_mask - 19, 156, 72, "method", ["t from step 2"], f"|x| > t = {T:g}")
    p.arrow((204, y_mask + 17), (left, y_mask + 17))
    p.cells(left, y_mask, (cell, 34), [f"{int(k)}" for k in keep], kinds)
    p.text(end + 10, y_mask + 22, "mask", "s soft", "start")
    columns(y_mask + 34, y_operand)

    p.text(126, y_operand + 14, "operand", "b l")
    p.text(126, y_operand + 33, "dropped entries are +0.0", "s soft")
    values = [f"{v:g}" if k else "0" for v, k in zip(X.astype(float).round(1), keep, strict=True)]
    p.cells(left, y_operand, (cell, 34), values, kinds)
    columns(y_operand + 34, y_ring)
    p.rect(middle - 74, y_operand + 44, 148, 30, "bare", 15)
    p.text(middle, y_operand + 64, "the same bits", "b")

    # multiplied
    p.heading(822, y_x - 13, "multiplied", "by the kept rows of W [in, out]")
    row, wide, into = 15, 190, y_x + 75
    p.arrow((end, y_operand + 17), (782, y_operand + 17), (782, into), (822, into))
    for n, kind in enumerate(kinds):
        p.rect(822, y_x + n * row, wide, row, kind, 0)
    p.arrow((822 + wide, into), (1044, into))
    p.rect(1044, into - 19, 90, 38, "bare", 0)
    p.text(1089, into + 5, "y", "m b")

    # captured
    p.text(126, y_ring + 32, "ring", "b l")
    p.text(126, y_ring + 51, "a row for each token", "s soft")
    rng = np.random.default_rng(2)
    for n, token in enumerate((17, 16, 15)):
        p.text(left - 10, y_ring + 20 + 30 * n, f"{token}", "m s soft", "end")
        other = [("kept", "none")[k] for k in rng.integers(0, 2, len(X))]
        words, own = ([""] * len(X), other) if n else (values, kinds)
        p.cells(left, y_ring + 30 * n, (cell, 30), words, own)
    bits = X[keep].view(np.uint16)
    row_of_file = [
        ("token", 60, "17"),
        ("nnz", 44, f"{int(keep.sum())}"),
        ("mask", 74, np.packbits(keep, bitorder="little").tobytes().hex(" ").upper()),
        ("values_lo", 138, (bits & 0xFF).astype(np.uint8).tobytes().hex(" ").upper()),
        ("values_hi", 138, (bits >> 8).astype(np.uint8).tobytes().hex(" ").upper()),
    ]
    x, y = 698.0, y_ring - 33
    p.arrow((end, y_ring + 15), (x, y_ring + 15))
    p.heading(x, y - 14, "captured", "in data/L02/down/part-00000.parquet")
    p.text(x, y + 92, "by way of a block of the dump; lowest bits and bytes first", "s soft", "start")
    for name, w, word in row_of_file:
        p.rect(x, y, w, 30, "file", 0)
        p.text(x + w / 2, y + 20, name, "m s")
        p.rect(x, y + 30, w, 36, "kept" if name[0] in "mv" else "bare", 0)
        p.text(x + w / 2, y + 53, word, "m s")
        x += w


def draw() -> str:
    """The whole picture as SVG, without fonts or files of elsewhere."""
    p = Picture()
    p.rect(0, 0, WIDTH, HEIGHT, "page", 0)
    pipeline(p)
    operand(p)
    sans = "ui-sans-serif,system-ui,'Segoe UI','Helvetica Neue',Arial,'Liberation Sans',sans-serif"
    mono = "ui-monospace,Menlo,Consolas,'Liberation Mono',monospace"
    css = (
        f"text{{font-family:{sans};font-size:15px}}.m{{font-family:{mono}}}.b{{font-weight:600}}"
        ".s{font-size:13px}.l{font-size:17px}rect,path{stroke-width:1.4}.page,.zoom,.tip{stroke:none}"
        f"{style(LIGHT)}@media (prefers-color-scheme:dark){{{style(DARK)}}}"
    )
    body = "\n".join(p.parts)
    title = "From a checkpoint and prompts to a workload in Parquet, and one operand up close"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<title>{title}</title>\n<style>{css}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
