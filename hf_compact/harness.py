"""lm-evaluation-harness, run on stock task definitions, from the Hub or from a folder of JSONL files.

Nothing of a task is rewritten: offline, its own YAML file is included and only the place of its data is changed. The harness is
an extra (`pip install hf_compact[eval]`), so it is imported where it is used.
"""

import contextlib
import functools
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .api import open_for_scoring
from .errors import ConfigError
from .products import fast_products

#: The name that `lm_eval --model` knows.
MODEL_NAME = "hf_compact"
#: What the harness's `hf` model reads where it is given a model in memory; it ignores the rest, adapters among them.
_READ = frozenset(
    [
        "batch_size",
        "max_batch_size",
        "max_length",
        "truncation",
        "logits_cache",
        "softmax_dtype",
        "mixed_precision_dtype",
        "add_bos_token",
        "prefix_token_id",
        "think_end_token",
        "enable_thinking",
        "chat_template_args",
        "backend",
        "trust_remote_code",
    ]
)
#: What a row that does not fit its task raises inside the harness, templates included.
_MISFITS = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@functools.cache
def register() -> type[Any]:
    """Make `lm_eval --model hf_compact --model_args pretrained=...` known in this process; returns the model class.

    It takes what the harness's own `hf` model takes with a model in memory (`batch_size`, `max_length`, `add_bos_token`,
    `think_end_token` …), besides `dtype` and `device`; `pretrained` is a Hub id, a folder, an adapter or a `.gguf` file.

    Raises:
        ConfigError: the harness is not installed.
    """
    _require()
    import lm_eval.models  # noqa: F401 - the harness registers its own models only while it knows of none
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(MODEL_NAME)
    class CompactLM(HFLM):  # type: ignore[misc]
        """A dense or compressed model, opened as `hf-compact evaluate` opens it."""

        progress: Callable[[int, int], None] | None = None

        def __init__(
            self, pretrained: str | PreTrainedModel, dtype: str = "auto", device: str | None = None, tokenizer: Any = None,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            if isinstance(pretrained, str):
                if unread := sorted(kwargs.keys() - _READ):
                    raise ConfigError(
                        f"{MODEL_NAME} does not read {', '.join(unread)}: pretrained names the folder, of adapters too"
                    )
                pretrained, own, _ = open_for_scoring(pretrained, dtype=dtype)
                is_there = device is not None and (torch.cuda.is_available() or not device.startswith("cuda"))
                pretrained.to(device if is_there else "cpu")  # the harness asks for cuda where there is none
                tokenizer = tokenizer or own
            super().__init__(pretrained=pretrained, tokenizer=tokenizer, **kwargs)

        @fast_products()
        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            return super()._model_call(*args, **kwargs)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            """Score continuations, telling the progress once for each."""
            if self.progress is None:
                return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            self.set_cache_hook(_Counter(self.progress, len(requests)))
            return super().loglikelihood(requests, disable_tqdm=True)

    return CompactLM


class _Counter:
    """Stands where the harness keeps finished answers, and counts them."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """One more is done."""
        self.done += 1
        self.progress(self.done, self.total)


def load_tasks(names: Sequence[str], task_data: Path | None = None) -> dict[str, Any]:
    """The harness's task objects, their data loaded and the first row of each tried.

    Args:
        names: tasks, groups or tags of the harness; with `task_data`, tasks.
        task_data: folder with `TASK.jsonl`, the rows of the split that the stock task scores, in the fields of its data set;
            `TASK.train.jsonl` beside it where examples are to be shown. None takes the data from the Hub.

    Returns:
        Name -> task.

    Raises:
        ConfigError: the harness is not installed, knows no such task, or cannot use the data.
    """
    _require()
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    if len(set(names)) != len(names) or not names:
        raise ConfigError(f"tasks must name each task once, got {','.join(names)!r}")
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        if task_data is not None:
            for name, config in offline_configs(names, task_data).items():
                Path(scratch, f"{name}.yaml").write_text(yaml.safe_dump(config))
        manager = TaskManager(include_path=scratch, include_defaults=task_data is None)
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise ConfigError(f"tasks: lm-evaluation-harness has no task {', '.join(map(repr, unknown))}")
        tasks: dict[str, Any] = {}
        for name in names:
            try:  # the harness tries the first row too
                tasks |= manager.load([name])["tasks"]
            except (ConnectionError, OSError, DatasetsError, TemplateError, *_MISFITS) as error:
                place = "from the Hub; offline, give task_data" if task_data is None else f"{name}.jsonl"
                reason = _first_line(error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error)
                raise ConfigError(f"tasks: the stock task {name} cannot use its rows ({place}): {reason}") from error
    return tasks


def offline_configs(names: Sequence[str], task_data: Path) -> dict[str, dict[str, Any]]:
    """For each task, a configuration that includes the stock one and takes its rows from a folder.

    Raises:
        ConfigError: a file is missing, or there is no stock task of that name.
    """
    stock = _stock_files(names)
    configs = {}
    for name in names:
        if name not in stock:
            raise ConfigError(f"tasks: lm-evaluation-harness has no task {name!r} (groups and tags are known online only)")
        path = task_data / f"{name}.jsonl"
        if not path.is_file():
            raise ConfigError(f"task_data must hold {name}.jsonl, {str(task_data)!r} has no such file")
        if not path.stat().st_size:
            raise ConfigError(f"task_data must hold rows in {name}.jsonl, that of {str(task_data)!r} is empty")
        splits = _splits(stock[name])
        scored = splits["test_split"] or splits["validation_split"]
        files = {scored: str(path.absolute())}
        shown = splits["fewshot_split"] or splits["training_split"]
        train = task_data / f"{name}.train.jsonl"
        if train.is_file():
            if not shown or shown == scored:  # the stock task has none to show
                shown = splits["training_split"] = splits["fewshot_split"] = "train"
            files[shown] = str(train.absolute())
        kept = {key: split if split in files else None for key, split in splits.items()}
        configs[name] = {
            "include": str(stock[name]),
            "task": name,
            "custom_dataset": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            **kept,
        }
    return configs


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any], *, limit: int | None = None,
    num_fewshot: int | None = None, batch_size: int = 1, progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the harness on tasks.

    Args:
        model: a causal language model.
        tokenizer: its own.
        tasks: of `load_tasks`.
        limit: rows of each task, from the first; None for all.
        num_fewshot: examples shown before each row; None is the task's own number.
        batch_size: sequences at a time.
        progress: called with finished and all requests.

    Returns:
        Task -> `metrics` (name -> `value` and `stderr`, the harness's own; its filter after a comma unless it is `none`),
        `num_items`, `num_fewshot`, `version`, and `items`, row by row: `hash` of the row and its prompt, every metric that is
        a number, for multiple choice the log-probability of the right answer among the choices (`logprob`), the chosen one
        (`choice`), and `choices` (log-probability of each).

    Raises:
        ConfigError: rows do not fit their task, or there is nothing to take examples from.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name, task in tasks.items():  # without any, the harness would show rows that it scores
        count = task.config.num_fewshot if num_fewshot is None else num_fewshot
        own = (task.fewshot_cfg.split, task.fewshot_cfg.samples)
        if count and own == (None, None) and not task.has_training_docs():
            raise ConfigError(f"num_fewshot: {name} has no rows to show {count} of: put {name}.train.jsonl into task_data")
    with _quiet():
        lm = register()(model, tokenizer=tokenizer, batch_size=batch_size)
        lm.progress = progress
        try:
            found = simple_evaluate(
                lm, tasks=list(tasks.values()), limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, log_samples=True,
                task_manager=TaskManager(include_defaults=False),  # its index of all tasks takes half a minute
            )  # fmt: skip
        except (TemplateError, *_MISFITS) as error:
            raise ConfigError(f"tasks: a row does not fit its task: {type(error).__name__}: {_first_line(error)}") from error
    result = {}
    for name, task in tasks.items():
        items = _items(task, found["samples"][name])
        result[name] = {
            "metrics": _metrics(found["results"][name]),
            "num_items": len(items["hash"]),
            "num_fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            "items": items,
        }
    return result


def command_line(arguments: Sequence[str]) -> None:
    """The harness's own command line, with the model `hf_compact`.

    Raises:
        ConfigError: the harness is not installed.
    """
    register()
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("tasks need lm-evaluation-harness: pip install 'hf_compact[eval]'") from error


def _stock_files(names: Sequence[str]) -> dict[str, Path]:
    """The YAML files that define tasks, found by their text: reading all of them as YAML takes a minute."""
    import lm_eval.tasks

    pattern = re.compile(rf"""^["']?task["']?:\s*["']?({"|".join(map(re.escape, names))})["']?\s*$""".encode(), re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        match = pattern.search(path.read_bytes())
        if match:
            found.setdefault(match[1].decode(), path)
    return found


def _splits(path: Path) -> dict[str, str | None]:
    """The names of a stock task's splits."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    return {key: config.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}


def _metrics(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` -> `acc: {value, stderr}`."""
    metrics = {}
    for key, value in row.items():
        metric, _, rule = key.partition(",")
        if rule and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = row.get(f"{metric}_stderr,{rule}")
            name = metric if rule == "none" else key
            metrics[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, int | float) else None}
    return metrics


def _items(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the rows, in their order and by the names of `_metrics`; of the first filter where a task has several."""
    first = samples[0]["filter"]
    samples = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])
    columns: dict[str, list[Any]] = {"hash": [f"{s['doc_hash'][:8]}{s['prompt_hash'][:8]}" for s in samples]}
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if all(isinstance(value, int | float) for value in values):
            columns[metric if first == "none" else f"{metric},{first}"] = [float(value) for value in values]
    if task.OUTPUT_TYPE == "multiple_choice":
        answers = [torch.tensor([pair[0] for pair in sample["filtered_resps"]], dtype=torch.float64) for sample in samples]
        columns["choices"] = [[round(value, 4) for value in row.log_softmax(0).tolist()] for row in answers]
        columns["choice"] = [int(row.argmax()) for row in answers]
        gold = [_right_answer(task, sample["doc"]) for sample in samples]
        if None not in gold:
            columns["logprob"] = [row[index] for row, index in zip(columns["choices"], gold, strict=True)]
    return columns


def _right_answer(task: Any, document: Mapping[str, Any]) -> int | None:
    """The index of the right choice, as the harness finds it; None for a task with several."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks: what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
