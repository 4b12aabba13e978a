r"""The path of a new user, every command as the README has it, from a clean clone to a model that is loaded back from a Hub.

    python -m evaluation.new_user --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.valid.raw --task-data rows

The clone, its environment and all that the commands make are in a folder of their own (`--work`), where a run that was stopped goes on
with the next command; delete it to begin anew. `my-model` is the
dense model as a folder, `text.txt` the text, `recipe.yaml` what the README shows; the Hub is the one of the tests, on loopback, where
a token in the environment takes the place of `hf auth login`. Task rows come from a folder where they are given (`--task-data`), and
times are taken in float32 where the processor computes bfloat16 in software, as the README advises. A
command that fails ends the measurement with the tail of its log. The last step asks lm-evaluation-harness itself for the tasks
that `hf-compact evaluate` scored.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from evaluation.steps import RESULTS, ROOT, bar, bar_table, machine
from hf_compact import api, harness
from hf_compact.checkpoint import write_text
from hf_compact.products import has_fast_bfloat16
from tests.fake_hub import environment, serve

MINUTES = 30
#: Heading of the README -> language and place of the block there that a step runs, and whether only one line of it.
STEPS = {
    "install and demo": ("Try it", "bash", 0),
    "Trainer script with one callback": ("In your Trainer script", "python", None),
    "compress": ("The command line", "bash", 1),
    "evaluate": ("Measure and publish", "bash", 0),
    "evaluate on tasks, with times": ("Measure and publish", "bash", 1),
    "publish": ("Measure and publish", "bash", 3),
    "load back": ("Measure and publish", "python", None),
}


def block(readme: str, heading: str, language: str, line: int | None) -> str:
    """What the README has below a heading: a whole block, or one line of it."""
    section = readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[1]
    return found if line is None else found.splitlines()[line]


def run(command: str | list[str], clone: Path, log: Path, variables: dict[str, str]) -> float:
    """Seconds of one command in the clone; its output goes to a log.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    with log.open("w") as stream:
        shell = isinstance(command, str)
        done = subprocess.run(
            command, shell=shell, cwd=clone, env=variables, stdout=stream, stderr=subprocess.STDOUT, check=False
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}\nended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


def differences(ours: Path, theirs: Path) -> tuple[int, int]:
    """How many metrics of the dense model's tasks there are, and how many of them differ from the harness's own."""
    base = next(model for model in json.loads(ours.read_text())["models"] if model["name"] == "my-model")
    direct = json.loads(theirs.read_text())["results"]
    pairs = [
        (metrics["value"], direct[task][name if "," in name else f"{name},none"])
        for task, entry in base["tasks"].items()
        for name, metrics in entry["metrics"].items()
    ]
    return len(pairs), sum(a != b for a, b in pairs)


def walk(options: argparse.Namespace) -> dict:
    """Every step with its seconds and command, the commit of the clone, and the comparison with the harness."""
    clone, kept = options.work.absolute() / "hf_compact", options.work / "steps.json"
    if not kept.exists():
        prepare(clone, options)
        write_text(kept, "[]\n")
    readme = (clone / "README.md").read_text(encoding="utf-8")
    steps = json.loads(kept.read_text())
    rows = [] if options.task_data is None else ["--task-data", str(options.task_data.absolute())]
    with serve() as hub:
        variables = os.environ | environment(hub, str(options.work.absolute() / "home"))
        variables["PATH"] = f"{clone / '.venv' / 'bin'}{os.pathsep}{variables['PATH']}"
        for name, place in list(STEPS.items())[len(steps) :]:
            command: str | list[str] = block(readme, *place)
            shown = command
            if place[1] == "python":
                script = clone / f"{name.replace(' ', '_')}.py"
                script.write_text(command)
                command, shown = ["python", script.name], f"the snippet below “{place[0]}”"
            elif "--tasks" in command:
                more = ["--output", "tasks.json", *([] if has_fast_bfloat16() else ["--dtype", "float32"])]
                command, shown = (
                    " ".join([command, *rows, *more]),
                    " ".join([command, *(["--task-data", "rows"] if rows else []), *more]),
                )
            seconds = run(command, clone, options.work / f"{name}.log", variables)
            steps.append({"step": name, "command": shown, "seconds": seconds})
            write_text(kept, json.dumps(steps) + "\n")
            print(f"{steps[-1]['seconds']:7.1f} s  {shown.splitlines()[0]}", flush=True)
        scored = block(readme, *STEPS["evaluate on tasks, with times"])
        found = compared(scored, clone, options, variables)
    at = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True, check=True).stdout
    return {"steps": steps, "commit": at.strip(), "num_metrics": found[0], "num_different": found[1]}


def prepare(clone: Path, options: argparse.Namespace) -> None:
    """A clone, and beside its files the user's own."""
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    readme = (clone / "README.md").read_text(encoding="utf-8")
    opened = api.open_dense(options.model, "float32", is_whole=True)  # some CPUs train bfloat16 in software
    opened.model.save_pretrained(clone / "my-model")
    opened.load_tokenizer().save_pretrained(clone / "my-model")
    shutil.copyfile(options.text, clone / "text.txt")
    (clone / "recipe.yaml").write_text(block(readme, "Use it in your own code", "yaml", None))


def compared(command: str, clone: Path, options: argparse.Namespace, variables: dict[str, str]) -> tuple[int, int]:
    """The tasks of a command, asked of the harness's own model class."""
    words = command.split()
    tasks = words[words.index("--tasks") + 1].split(",")
    names = list(tasks)
    if options.task_data is not None:
        for name, config in harness.offline_configs(tasks, options.task_data).items():
            (options.work / f"{name}.yaml").write_text(yaml.safe_dump(config))
        names = [str((options.work / f"{name}.yaml").absolute()) for name in tasks]
    asked = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained=my-model,dtype={'bfloat16' if has_fast_bfloat16() else 'float32'}",
        "--device",
        "cpu",
        "--tasks",
        *names,
    ]
    asked += ["--limit", words[words.index("--limit") + 1], "--batch_size", "1"]
    run(["lm_eval", "run", *asked, "--output_path", "direct.json"], clone, options.work / "lm_eval.log", variables)
    return differences(clone / "tasks.json", next(clone.glob("direct_*.json")))


def main() -> int:
    """Walk the path and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense: folder, Hub id or .gguf file")
    parser.add_argument("--text", required=True, type=Path, help="the user's text: to calibrate, train and score")
    parser.add_argument("--task-data", type=Path, help="folder with the rows of tasks; default: from the Hub")
    parser.add_argument("--work", type=Path, default=Path("runs/new-user"), help="folder of the clone and of what is made there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()
    found = walk(options)
    seconds = sum(step["seconds"] for step in found["steps"])
    source = {"commit": found["commit"], "machine": machine()}
    command = f"python -m evaluation.new_user --model {Path(options.model).name} --text {options.text.name}"
    command += " --task-data rows" if options.task_data else ""
    same, scored = found["num_different"], next(step["seconds"] for step in found["steps"] if "--tasks" in step["command"])
    bars = [
        bar("install, demo, Trainer script, compress, evaluate, publish, load back: minutes", f"<= {MINUTES}",
            round(seconds / 60, 1), seconds <= MINUTES * 60, source, seconds),
        bar(f"metrics of tasks that differ from the harness called directly, of {found['num_metrics']}", "0", same,
            same == 0 and found["num_metrics"] > 0, source, scored),
    ]  # fmt: skip
    result = {"command": command, "seed": 0, **source, "bars": bars, "steps": found["steps"]}
    lines = ["| step | command | seconds |", "|---|---|---:|"]
    lines += [f"| {step['step']} | `{step['command']}` | {step['seconds']:.0f} |" for step in found["steps"]]
    text = (
        f"# A new user's path\n\n{source['machine']}; commit {source['commit']}.\n\n{bar_table(bars)}\n\n"
        + "\n".join(lines)
        + "\n"
    )
    write_text(options.results / "08-new-user.json", json.dumps(result, indent=2) + "\n")
    write_text(options.results / "08-new-user.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
