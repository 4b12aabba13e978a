"""Rows in the fields of the harness's stock data sets, made up."""

import json
from pathlib import Path

ROWS = {
    "arc_easy": [
        {"question": f"What comes after {i}?", "choices": {"text": [f"{i + 1}", "a cat", "no"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]}
        for i in range(7)
    ],
    "lambada_openai": [{"text": f"The {word} sat on the mat and said that the {word}"} for word in ("cat", "dog", "king", "bird", "list")],
    "winogrande": [
        {"sentence": f"Bob gave {i} apples to Al because _ was kind.", "option1": "Bob", "option2": "Al", "answer": str(1 + i % 2)}
        for i in range(6)
    ],
    "hellaswag": [
        {"ind": i, "activity_label": "Running", "ctx_a": f"A man runs {i} miles.", "ctx_b": "he", "endings": ["stops.", "goes [title] on.", "x", "flies."], "label": i % 4}
        for i in range(5)
    ],
    "piqa": [{"goal": f"open door {i}", "sol1": "push it", "sol2": "eat it", "label": i % 2} for i in range(6)],
    "openbookqa": [
        {"question_stem": f"Stone {i} is", "choices": {"text": ["hard", "soft"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]} for i in range(4)
    ],
    "sst2": [{"sentence": f"a fine film {i} ", "label": i % 2, "idx": i} for i in range(6)],
}  # fmt: skip


def write_tasks(folder: Path, **others) -> Path:
    """One JSONL file per task; others replace or add rows."""
    for name, rows in (ROWS | others).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
