r"""Bytes on disk against perplexity: our recipes and other libraries in one picture and one JSON.

    python -m evaluation.pareto MODEL.gguf --ours runs/rates --text wiki.test.raw --text c4.utf8 --output evaluation/results/02-pareto.json

Our points are the rows that `evaluation.rates` has scored, the others are scored by `evaluation.peers`; the dense model is
scored by both, and has to come out the same. Finished rows are kept, so an interrupted run goes on. Bytes are those of the
whole model, untouched tensors in bfloat16. The picture lies beside the JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from evaluation.peers import markdown, rows
from evaluation.steps import commit
from hf_compact.results import Results

HERE = Path(__file__).parent
#: Relative difference of a perplexity that is rounding only.
SAME = 1e-4


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, by rising size.

    >>> front([(1, 9), (2, 5), (3, 7)])
    [(1, 9), (2, 5)]
    """
    kept: list[tuple[float, float]] = []
    for size, score in sorted(points):
        if not kept or score < kept[-1][1]:
            kept.append((size, score))
    return kept


def plot(rows: list[dict], path: Path) -> None:
    """One panel a text."""
    rows = [row for row in rows if "skipped" not in row]
    texts = list(rows[0]["scores"])
    figure = Figure(figsize=(6 * len(texts), 5), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        points = {
            label: [(row["label"], row["file_bytes"] / 1e6, row["scores"][text]) for row in rows if row["is_ours"] is is_ours]
            for is_ours, label in ((True, "hf_compact"), (False, "others"))
        }
        draw_front(axes, points, f"perplexity on {text}")
    figure.savefig(path, dpi=120)


def draw_front(
    axes: Axes, groups: Mapping[str, Sequence[tuple[str, float, float]]], label: str, is_more_better: bool = False
) -> None:
    """Megabytes against a score, every point with its name, and the front of each group.

    Args:
        axes: to draw into.
        groups: legend -> `(name, MB, score)`.
        label: what the score is.
        is_more_better: of the score; it is then drawn on a linear axis.
    """
    sign = -1 if is_more_better else 1
    for number, (group, points) in enumerate(groups.items()):
        color = f"C{number}"
        axes.plot([size for _, size, _ in points], [score for *_, score in points], "os^D"[number % 4], label=group, color=color)
        for name, size, score in points:
            axes.annotate(name, (size, score), fontsize=7, xytext=(4, 3), textcoords="offset points")
        best = [(size, sign * score) for size, score in front([(size, sign * score) for _, size, score in points])]
        axes.plot([size for size, _ in best], [score for _, score in best], "-", alpha=0.4, color=color)
    axes.margins(x=0.18)  # for the name of the largest
    axes.set_xscale("log")
    axes.set_yscale("linear" if is_more_better else "log")
    for axis in [axes.xaxis] if is_more_better else [axes.xaxis, axes.yaxis]:
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))  # 13.4, not 1.34 x 10^1
    axes.set_xlabel("MB on disk, whole model")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")
    if len(groups) > 1:
        axes.legend()


def our_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipes that `evaluation.rates` has kept, without their controls, in the form of `evaluation.peers`."""
    return [
        {
            "label": name,
            "body_bits_per_weight": row["totals"]["body_bits_per_weight"],
            "file_bytes": row["file_bytes"],
            "scores": row["perplexity"],
            "seconds": row["command_seconds"],
            "commit": row["commit"],
            "is_ours": True,
        }
        for name, row in found.items()
        if name != "dense" and ", " not in name
    ]


def main() -> int:
    """Score what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: folder or .gguf file")
    parser.add_argument("--ours", type=Path, required=True, help="work folder of evaluation.rates")
    parser.add_argument("--text", action="append", required=True, help="a text to score; repeat for several")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file; the rows of the others are kept in the work folder"
    )
    options = parser.parse_args()
    found = json.loads((options.ours / "rows.json").read_text())
    peers = options.ours / "peers.json"
    command = [sys.executable, str(HERE / "peers.py"), options.model, "--output", str(peers), "--commit", commit()]
    subprocess.run([*command, *(argument for text in options.text for argument in ("--text", text))], check=True)
    others = [{"is_ours": False} | row for row in rows(Results.read(peers)) if row["label"] not in found]
    dense = next(row for row in others if row["label"] == "dense bf16")["scores"]
    if any(abs(value / dense[text] - 1) > SAME for text, value in found["dense"]["perplexity"].items()):
        sys.exit(f"the dense model scores {dense} here and {found['dense']['perplexity']} there: not one protocol")
    table = others + our_rows(found)
    options.output.write_text(json.dumps(table, indent=2) + "\n")
    options.output.with_suffix(".md").write_text(markdown(table, options.text))
    plot(table, options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
