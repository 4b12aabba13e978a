r"""Evaluation rows in the layout of llm-foundry, and SST-2 as GLUE ships it, as JSONL in the fields of lm-evaluation-harness's data sets.

    python scripts/convert_task_data.py eval glue/SST-2/dev.tsv --output rows
    hf-compact evaluate my-model --tasks arc_easy,piqa,winogrande --task-data rows

A folder is searched for the files of `FILES`; a file is taken by its name. Every converted row gives the harness the same
prompt and the same answers as the row of the original data set; a row that cannot be said so ends it with its number.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_compact.checkpoint import write_text
from hf_compact.errors import CompactError, ConfigError

Row = dict[str, Any]


def question(query: str) -> str:
    r"""The question alone, which the harness's prompt frames itself.

    >>> question("Question: What is it?\n")
    'What is it?'
    """
    return query.removeprefix("Question: ").removesuffix("Answer:").rstrip("\n")


def lettered(choices: list[str]) -> Row:
    """Choices as ARC and OpenBookQA hold them."""
    return {"text": choices, "label": [chr(ord("A") + number) for number in range(len(choices))]}


def arc(row: Row) -> Row:
    """`query`, `choices`, `gold` -> `question`, `choices`, `answerKey`."""
    choices = lettered(row["choices"])
    return {"question": question(row["query"]), "choices": choices, "answerKey": choices["label"][row["gold"]]}


def openbookqa(row: Row) -> Row:
    """`query`, `choices`, `gold` -> `question_stem`, `choices`, `answerKey`."""
    choices = lettered(row["choices"])
    return {"question_stem": row["query"], "choices": choices, "answerKey": choices["label"][row["gold"]]}


def piqa(row: Row) -> Row:
    """`query`, `choices`, `gold` -> `goal`, `sol1`, `sol2`, `label`."""
    first, second = row["choices"]
    return {"goal": question(row["query"]), "sol1": first, "sol2": second, "label": row["gold"]}


def winogrande(row: Row) -> Row:
    """`context_options`, `continuation`, `gold` -> `sentence` with a gap, `option1`, `option2`, `answer`.

    >>> winogrande({"context_options": ["Al hit Bob so Al", "Al hit Bob so Bob"], "continuation": "ran.", "gold": 0})["sentence"]
    'Al hit Bob so _ ran.'
    """
    first, second = row["context_options"]
    alike = next((place for place, pair in enumerate(zip(first, second, strict=False)) if len(set(pair)) == 2), 0)
    start = first.rfind(" ", 0, alike) + 1
    if "_" in first[:start] or first[start:] == second[start:]:
        raise ValueError("context_options must differ in what they end with, and hold no underscore before it")
    sentence = f"{first[:start]}_ {row['continuation']}"
    return {"sentence": sentence, "option1": first[start:], "option2": second[start:], "answer": str(row["gold"] + 1)}


def lambada(row: Row) -> Row:
    """`context`, `continuation` -> `text`, whose last word is asked for."""
    if " " in row["continuation"]:
        raise ValueError(f"continuation must be one word, got {row['continuation']!r}")
    return {"text": f"{row['context']} {row['continuation']}"}


def hellaswag(row: Row) -> Row:
    """Original fields; those that the task reads."""
    return {key: row[key] for key in ("ind", "activity_label", "ctx_a", "ctx_b", "endings", "label")}


def sst2(row: Row) -> Row:
    """`sentence`, `label`."""
    return {"sentence": row["sentence"], "label": int(row["label"])}


#: File name -> task and what makes a row of it.
FILES: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "arc_easy.jsonl": ("arc_easy", arc),
    "hellaswag_val_1000.jsonl": ("hellaswag", hellaswag),
    "lambada_openai.jsonl": ("lambada_openai", lambada),
    "openbook_qa.jsonl": ("openbookqa", openbookqa),
    "piqa.jsonl": ("piqa", piqa),
    "winogrande.jsonl": ("winogrande", winogrande),
    "dev.tsv": ("sst2", sst2),
}


def rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL or TSV file."""
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix == ".tsv":
            yield from csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from (json.loads(line) for line in stream if line.strip())


def convert(sources: list[Path], output: Path) -> dict[str, int]:
    """Write one file a task.

    Returns:
        Task -> number of rows.

    Raises:
        ConfigError: nothing to convert, or a row that does not fit; nothing is written then.
    """
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for source in sources:
        paths = [source / name for name in FILES if (source / name).is_file()] if source.is_dir() else [source]
        if not paths or (source.name not in FILES and not source.is_dir()):
            raise ConfigError(f"{str(source)!r} must be, or hold, one of {', '.join(FILES)}")
        for path in paths:
            task, function = FILES[path.name]
            lines: list[str] = []
            try:
                for row in rows(path):
                    lines.append(json.dumps(function(row), ensure_ascii=False) + "\n")  # noqa: PERF401 - counted in the message
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                raise ConfigError(f"{path.name}, row {len(lines) + 1}: {type(error).__name__}: {error}") from error
            found[task], counts[task] = "".join(lines), len(lines)
    output.mkdir(parents=True, exist_ok=True)
    for task, text in found.items():
        write_text(output / f"{task}.jsonl", text)
    return counts


def main() -> int:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="folders or files")
    parser.add_argument("--output", type=Path, required=True, help="folder of TASK.jsonl, made where it is missing")
    options = parser.parse_args()
    try:
        counts = convert(options.sources, options.output)
    except CompactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for task, count in counts.items():
        print(f"{task}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
