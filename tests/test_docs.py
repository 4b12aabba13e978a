"""The documentation: links lead somewhere, every page is in the menu, API pages name what exists, tables repeat what was measured."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "evaluation").rglob("*.md")])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """Without code, in which brackets are no links."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda found: "x" * len(found[0]), text)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_pages_are_seen():
    assert {"README.md", "docs/index.md", "docs/choose.md", "docs/api/functions.md"} <= {relative(path) for path in PAGES}
    assert sum("](" in text_of(path) for path in PAGES) >= 6


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{relative(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{relative(page)} links to {target}, which has no such heading"


def test_parts_that_pages_include_are_there():
    """In the one form that the site builder knows; anything else is shown as it stands."""
    included = [
        line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("--8")
    ]
    names = [re.fullmatch(r'--8<-- "([^":]+)(:\d+)?"', line) for line in included]
    assert all(names), included
    assert {"scripts/examples/trainer_callback.py", "evaluation/results/02-pareto.md"} <= {found[1] for found in names}
    assert all((ROOT / found[1]).is_file() for found in names)


def test_every_page_is_in_the_menu():
    def files(entries):
        for entry in entries:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else [value]

    menu = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(menu) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_method_has_a_page():
    from hf_compact.methods import METHODS

    for name in (*METHODS, "compacter", "one_bit_adam"):
        headings = re.findall(r"^## (.+)$", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert {"When to use it", "Measured", "Limits"} <= set(headings), name


def test_names_on_api_pages_exist():
    import hf_compact

    named = [name for path in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)]
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    left_out = {"CompactError", "__version__"}
    assert {f"hf_compact.{name}" for name in hf_compact.__all__ if name not in left_out} <= set(named)


def test_the_table_of_examples_names_every_script():
    named = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "examples.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "scripts" / "examples").glob("*.py") if path.stem != "setting")


@pytest.mark.parametrize(("page", "count"), [("codebook.md", 4), ("entropy.md", 5)])
def test_tables_repeat_what_was_measured(page, count):
    rows = {row["label"]: row for row in json.loads((ROOT / "evaluation" / "results" / "02-pareto.json").read_text())}
    dense = rows["dense bf16"]["scores"]
    seen = 0
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if label in rows and len(cells) == 4:
            row = rows[label]
            ratios = [f"{row['scores'][text] / dense[text]:.4f}" for text in ("wiki.test.raw", "c4.utf8")]
            assert cells == [f"{row['body_bits_per_weight']:.3f}", f"{row['file_bytes'] / 1e6:.1f}", *ratios], label
            seen += 1
    assert seen == count


def cells_of(page):
    """The cells of every row of a page's tables."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def measured(name):
    """Row -> what it scored, times dense; bits and bytes where they are kept."""
    rows = json.loads((ROOT / "evaluation" / "results" / f"{name}.json").read_text())["rows"]
    rows = rows if isinstance(rows, dict) else {row["name"]: row for row in rows}
    dense = json.loads((ROOT / "evaluation" / "results" / "05-pruning.json").read_text())["rows"]["dense"]["perplexity"]
    return {
        label: (row, [f"{value / row.get('base', dense)[text]:.3f}" for text, value in row["perplexity"].items()])
        for label, row in rows.items() if "perplexity" in row
    }  # fmt: skip


def test_the_table_of_distillation_repeats_what_was_measured():
    rows, seen = {**measured("02-codebook"), **measured("05-pruning")}, 0
    for label, *cells in cells_of("distillation.md"):
        name = label.removesuffix(", 1.73 bits per block weight")
        before = next((f"{name}{ending}" for ending in (", not distilled", "-not-distilled") if f"{name}{ending}" in rows), None)
        if before is not None:
            assert cells[1:] == [value for pair in zip(rows[before][1], rows[name][1], strict=True) for value in pair], label
            seen += 1
    assert seen == 5


def test_the_table_of_corrections_repeats_what_was_measured():
    rows = measured("03-tensor-network")
    found = [cells for label, *cells in cells_of("correction.md") if "entropy" in label]
    for name, cells in zip(("correction", "correction-control"), found, strict=True):
        row, ratios = rows[name]
        assert cells == [f"{row['totals']['body_bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e6:.1f}", *ratios]


def test_the_table_of_nested_bits_repeats_what_was_measured():
    rows = json.loads((ROOT / "evaluation" / "results" / "02-encoder.json").read_text())["rows"]
    cosines = {row["label"]: (row, row["cosines"]) for row in rows}
    cosines |= {f"{row['label']}, {bits} bits": (row, view) for row in rows for bits, view in row.get("views", {}).items()}
    seen = 0
    for label, *cells in cells_of("nested.md"):
        if label in cosines:
            row, view = cosines[label]
            assert cells == [f"{row['body_bits_per_weight']:.2f}", *(f"{text['mean']:.4f}" for text in view.values())], label
            seen += 1
    assert seen == 6


@pytest.mark.cli
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="mkdocs-material and mkdocstrings are not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "functions" / "index.html").read_text(encoding="utf-8")
    assert "Upload a folder to the Hub" in page
