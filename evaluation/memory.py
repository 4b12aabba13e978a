"""Peak memory of compressing a checkpoint on disk, against the bound: embeddings, two blocks, activations, 400 MB.

Writes the dense model as a folder of bfloat16 safetensors first, because a GGUF file is always loaded whole. The peak
is that of the compressing process alone, as the operating system counts it.

    python evaluation/memory.py MODEL.gguf --recipe configs/recipes/codebook-4bit.yaml --text wiki.valid.raw --output memory.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hf_compact import api


def main() -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or .gguf file of a dense model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "dense")
        dense = api.open_dense(options.model)
        if dense.source is None:
            dense.model.save_pretrained(folder)
            dense.load_tokenizer().save_pretrained(folder)
        else:
            folder = dense.folder
        del dense
        planned = api.plan(folder, options.recipe)
        started = time.perf_counter()
        command = [sys.executable, "-m", "hf_compact", "compress", str(folder), "--recipe", options.recipe]
        command += ["--output", str(Path(scratch, "small")), "--calibration", options.text]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        report = json.loads(Path(scratch, "small", "compression_report.json").read_text())
    result = {
        "bound_bytes": planned["peak_memory_bytes"],
        "peak_bytes": report["peak_memory_bytes"],
        "held": report["peak_memory_bytes"] <= planned["peak_memory_bytes"],
        "seconds": seconds,
        "report_seconds": report["seconds"],
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
