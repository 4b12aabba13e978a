"""Publishing on the Hub: what readers of a folder need, after a check that it is what was verified.

The transfer is `huggingface_hub`'s own, which retries what fails for a moment and sends no byte twice: an interrupted push
goes on by running it again. The token is read by `huggingface_hub` and seen by nothing here.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from httpx2 import HTTPError
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelInfo, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from .. import verify
from ..checkpoint import REPORT_NAME, Journal, TensorSource, hash_files, hash_model, write_text
from ..config import without_places
from ..errors import FormatError, OutputError, UnsupportedModel, VerificationError
from ..report import Report
from .card import PLACEHOLDER, short_card, with_scores, write_card

logger = logging.getLogger(__name__)
#: What this library and transformers write into a model's folder; anything else, a token in a text file say, stays at home.
_SENT = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx", "*.onnx.data", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "recipe.json",
    "compression_report.json", "recovery.json", "layers.png", "removed.png", "README.md", "modeling_hf_compact.py",
    "modeling_low_rank.py",
)  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates"
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.gguf", "*.onnx", "*.onnx.data"]
_ADAPTER_REPORT = "recovery.json"
_PROBE_TOKENS = 32
#: What a config says without an effect on the numbers of the model.
_NO_SETTINGS = {"auto_map", "transformers_version"}


def push_folder(  # noqa: PLR0913 - by keyword
    folder: Path, repo_id: str, *, private: bool = True, force: bool = False, overwrite: bool = False, base: str | None = None,
    token: str | None = None, commit_message: str | None = None, scores: Sequence[EvalResult] = (),
) -> str:  # fmt: skip
    """Upload a folder as a model repository; interrupted, the same call goes on.

    Only the files that make up a model are sent: no hidden ones, no subfolders but further chat templates. The others are named
    in the log.

    Args:
        folder: complete, as `compress`, `recover` or `export` leave it.
        repo_id: `user/name`; created if it does not exist.
        private: create it private, and refuse one that is public; False creates it public, and refuses one that is private.
        force: send a folder that was not verified, or has changed since.
        overwrite: replace what the repository holds; its history keeps the old files.
        base: Hub id of the model that an adapter stands on; None is the one its config names, which must not be a folder then.
        token: with the right to write; None is the one of `HF_TOKEN` or `hf auth login`.
        commit_message: of the commit.
        scores: for the card, beside what it holds.

    Returns:
        The address of the commit.

    Raises:
        VerificationError: the folder was not verified; nothing is sent.
        FormatError: the folder is not complete; nothing is sent.
        OutputError: no token or no right to write, a repository that holds something else, an adapter on a model that nobody
            else has, or the Hub failed.
    """
    for field, name in (("repo_id", repo_id), ("base", base)):
        if name is not None:
            _check_name(field, name)
    if token is None and get_token() is None:
        raise OutputError("pushing needs a token with the right to write: run `hf auth login`, or set HF_TOKEN")
    if Journal.is_unfinished(folder):
        raise VerificationError(f"{folder} is the output of a run that has not finished: run the same command again first")
    reason = _unverified(folder)
    if reason and not force:
        raise VerificationError(f"{folder} {reason}: verify it, or force the push")
    _check_base(folder, base)
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch, _hub_errors(repo_id):
        staged = _stage(folder, Path(scratch), repo_id, base, scores)
        _check_card(staged / "README.md")
        info = _existing(hub, repo_id)
        if info is None:
            hub.create_repo(repo_id, private=private, exist_ok=True)
        else:
            _check_repository(info, staged, private, overwrite)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=staged, commit_message=commit_message or "Upload compressed model",
            delete_patterns=_WEIGHTS if overwrite and info is not None else None,
        )  # fmt: skip
    return str(commit.commit_url)


def push_model(  # noqa: PLR0913 - by keyword
    model: PreTrainedModel, repo_id: str, *, tokenizer: PreTrainedTokenizerBase | None = None, report: Report | None = None,
    private: bool = True, overwrite: bool = False, token: str | None = None, commit_message: str | None = None,
    max_shard_size: int | str = "5GB",
) -> str:  # fmt: skip
    """Upload a compressed model in memory, as its `push_to_hub` does.

    A model that still is what it was loaded as, from a folder or from the Hub, is sent as that folder, tokenizer, report and card
    included. Any other is saved, reloaded in a fresh process and compared before a byte is sent.

    Args:
        model: compressed by this library; it has this function as `model.push_to_hub(repo_id, ...)`.
        repo_id: as for `push_folder`, and so the other arguments that it has.
        tokenizer: to upload with it; None is that of the folder, or of the repository, it was loaded from.
        report: what `compress` returned for this model; the card is made from it. Its perplexity is left out where the
            model has been changed since it was scored.
        private: as for `push_folder`.
        overwrite: as for `push_folder`.
        token: as for `push_folder`.
        commit_message: as for `push_folder`.
        max_shard_size: of each file.

    Returns:
        The address of the commit.

    Raises:
        VerificationError: the saved model does not give the same logits; nothing is sent.
        UnsupportedModel: the model does not take token ids, on which it is verified.
        OutputError: as for `push_folder`.
    """
    settings: dict[str, Any] = {
        "private": private, "overwrite": overwrite, "token": token, "commit_message": commit_message
    }  # fmt: skip
    if model.main_input_name != "input_ids":
        raise UnsupportedModel(
            f"a {type(model).__name__} takes {model.main_input_name}, and push_to_hub verifies on token ids: push its folder"
        )
    origin = _origin(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if origin is not None and tokenizer is None and report is None and _is_unchanged(origin, folder):
            return push_folder(origin, repo_id, **settings)
        if origin is not None and tokenizer is None and (origin / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(origin)
        if tokenizer is None:
            logger.warning("sent without a tokenizer: none is given, and none is known where the model comes from")
        else:
            tokenizer.save_pretrained(folder)
        verification = _verify(model, folder)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if report is not None:
            if _is_about(report, origin, folder, verification["files"]):
                verification = {**(report.verification or {}), **verification}
            report = replace(report, verification=verification, file_bytes=file_bytes)
            write_text(folder / "recipe.json", json.dumps(report.recipe, indent=2) + "\n")
            write_card(report, folder)
        return push_folder(folder, repo_id, force=report is None, **settings)


def _origin(model: PreTrainedModel) -> Path | None:
    """The folder that a model was loaded from, or the local copy of its repository at that commit; None if there is neither."""
    name = model.config.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(name)
        return Path(snapshot_download(name, revision=getattr(model.config, "_commit_hash", None), allow_patterns=list(_SENT)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None


def _unverified(folder: Path) -> str | None:
    """Why a folder does not count as verified.

    Raises:
        FormatError: it is damaged, or holds no model.
    """
    if (folder / "adapter_config.json").is_file():
        return _unverified_adapter(folder)
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            return f"has no {REPORT_NAME}"
        raise FormatError(f"{folder} has no config.json: push sends folders of compress, recover or export")
    if any(folder.glob("*.onnx")):
        return f"has no {REPORT_NAME}"
    files = TensorSource.in_folder(folder).files
    if not (folder / REPORT_NAME).is_file():
        return f"has no {REPORT_NAME}"
    report = Report.read(folder / REPORT_NAME)
    if not report.is_verified:
        return f"failed its verification ({(report.verification or {}).get('reason', 'it was never reloaded')})"
    size = sum(path.stat().st_size for path in files)
    if size != report.file_bytes:
        return f"has changed since it was verified (its weights take {size} bytes, then {report.file_bytes})"
    return _changed(folder, (report.verification or {}).get("files"))


def _unverified_adapter(folder: Path) -> str | None:
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FormatError(f"{folder} holds no {weights.name}")
    TensorSource([weights])
    if not (folder / _ADAPTER_REPORT).is_file():
        return f"has no {_ADAPTER_REPORT}"
    try:
        found = json.loads((folder / _ADAPTER_REPORT).read_text(encoding="utf-8"))
        if not found["verification"]["verified"]:
            return f"failed the verification in its {_ADAPTER_REPORT}"
        return _changed(folder, found["verification"].get("files"))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder / _ADAPTER_REPORT} is no report of recover: {type(error).__name__}") from error


def _changed(folder: Path, verified: dict[str, str] | None) -> str | None:
    """What is not the file that was verified; a report that is older than its hashes is taken at its word."""
    if verified is None:
        return None
    found = hash_model(folder)
    names = [name for name in sorted(verified.keys() | found.keys()) if verified.get(name) != found.get(name)]
    return f"has changed since it was verified ({', '.join(names)})" if names else None


def _check_name(field: str, name: str) -> None:
    if "/" not in name:
        raise OutputError(f"{field} must be user/name, got {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OutputError(f"{field} {name!r} is not valid: {error}") from error


def _check_base(folder: Path, base: str | None) -> None:
    """Raise OutputError if an adapter would name a folder of this machine, on which the Hub refuses its card too."""
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise OutputError(f"base belongs to an adapter, and {folder} holds none")
        return
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if base is None and (not named or Path(named).is_absolute() or Path(named).exists()):
        raise OutputError(f"{folder} stands on {named!r}, which nobody else has: push that first, and name it (--base user/name)")


def _stage(folder: Path, scratch: Path, repo_id: str, base: str | None, scores: Sequence[EvalResult]) -> Path:
    """A folder of links to what is sent, a card that names the repository, and reports without paths of this machine."""
    staged = scratch / "staged"
    staged.mkdir()
    files = [path for path in folder.iterdir() if _is_sent(path)]
    left = sorted(path.name for path in folder.iterdir() if path not in files and path.name != _CHAT_TEMPLATES)
    if left:
        logger.warning("left out, not sent: %s", ", ".join(left))
    for path in files + sorted((folder / _CHAT_TEMPLATES).glob("*.jinja")):
        link = staged / path.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path.resolve())
    for name in (REPORT_NAME, _ADAPTER_REPORT, "recipe.json"):
        if (staged / name).exists():
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"))
                public = _without_places(values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{folder / name} is damaged: {type(error).__name__}: {error}") from error
            if public != values:
                (staged / name).unlink()
                write_text(staged / name, json.dumps(public, indent=2) + "\n")
    card = staged / "README.md"
    name = repo_id.rpartition("/")[2]
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else short_card(name, folder)
    except UnicodeDecodeError as error:
        raise OutputError(f"the card README.md of {folder} is not UTF-8: {error}") from error
    card.unlink(missing_ok=True)
    write_text(card, with_scores(text if base is None else _on_base(text, base), scores, name).replace(PLACEHOLDER, repo_id))
    if base is not None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        (staged / "adapter_config.json").unlink()
        write_text(staged / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return staged


def _is_sent(path: Path) -> bool:
    return path.is_file() and path.name[0] != "." and any(fnmatchcase(path.name, pattern) for pattern in _SENT)


def _on_base(text: str, base: str) -> str:
    """An adapter's card that names the model it stands on, where PEFT has written a folder."""
    card = ModelCard(text)
    card.data.base_model = base
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")] + [f"base_model:adapter:{base}"]
    return str(card)


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    """A report, or a recipe, that says which files it is about, and not where they lie on this machine."""
    if "recipe" in values:
        values = values | {"recipe": without_places(values["recipe"])}
    if "stages" in values:
        values = without_places(values)
    named = {key: values[key] for key in ("model", "teacher", "output") if isinstance(values.get(key), str)}
    return values | {key: Path(name).name for key, name in named.items() if Path(name).is_absolute() or Path(name).exists()}


def _check_card(card: Path) -> None:
    try:
        ModelCard.load(card).validate(repo_type="model")
    except (ValueError, YAMLError) as error:  # text that is not UTF-8 is a ValueError
        raise OutputError(f"the Hub does not accept the card README.md: {' '.join(str(error).split())}") from error


def _existing(hub: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return hub.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _check_repository(info: ModelInfo, staged: Path, private: bool, overwrite: bool) -> None:
    """Raise OutputError where the push would publish what is to be private, or replace what is not its own earlier part."""
    if private and not info.private:
        raise OutputError(f"{info.id} exists and is public: say so (--public), or choose another name")
    if info.private and not private:
        raise OutputError(f"{info.id} exists and is private: leave out --public, or make it public on the Hub first")
    files = (other for other in info.siblings or [] if other.rfilename != ".gitattributes")
    for other in () if overwrite else files:
        path = staged / other.rfilename
        if not path.exists() or not _is_same(path, other):
            raise OutputError(f"{info.id} exists and holds another {other.rfilename}: choose another name, or overwrite it")


def _is_same(path: Path, other: RepoSibling) -> bool:
    if other.lfs is not None:
        return other.lfs.sha256 == hash_files([path])
    return other.blob_id == git_hash(path.read_bytes())


def _is_about(report: Report, origin: Path | None, saved: Path, files: dict[str, str]) -> bool:
    """Whether the model that a report has scored is the one that was saved just now, to the bit."""
    earlier = report.verification or {}
    if earlier.get("files") == files:
        return True
    # The same tensors may be in other shards; then the folder has to be the one of this very report.
    return (
        origin is not None
        and _is_unchanged(origin, saved)
        and Report.read(origin / REPORT_NAME).verification == report.verification
    )


def _is_unchanged(origin: Path, saved: Path) -> bool:
    """Whether a model that was saved just now is the verified folder it came from, to the bit."""
    if not (origin / REPORT_NAME).is_file() or _unverified(origin):
        return False
    old, new = TensorSource.in_folder(origin), TensorSource.in_folder(saved)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (origin, saved)]
    keys = (configs[0].keys() | configs[1].keys()) - _NO_SETTINGS
    if any(configs[0].get(key) != configs[1].get(key) for key in keys):
        return False
    return old.headers() == new.headers() and all(
        torch.equal(old.read([name])[name], new.read([name])[name]) for name in old.file_of
    )


def _verify(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Reload what was saved, and compare on random tokens."""
    size = model.config.get_text_config().vocab_size
    probe = {"input_ids": torch.randint(size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))}
    if model.config.is_encoder_decoder:
        probe["decoder_input_ids"] = probe["input_ids"]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**{name: ids.to(model.device) for name, ids in probe.items()})[0].cpu()
    model.train(was_training)
    found = verify.verify(folder, probe, logits, None, str(model.device))
    return {name: value for name, value in found.items() if name not in ("seconds", "perplexity")}


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the Hub says, in one line with what to do."""
    try:
        yield
    except (HTTPError, ConnectionError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # what threads of the upload run into
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            advice = {
                401: "the token is not valid, or may not create it: make one with the right to write, and run `hf auth login`",
                403: f"the token has no right to write to {repo_id.partition('/')[0]}: make one that has, or choose another user",
                404: "it does not exist, or the token may not see it",
            }
            again = "run the same command again: what has arrived is not sent a second time"
            raise OutputError(f"the Hub refused {repo_id} with {status}: {advice.get(status, again)}") from error
        if isinstance(cause, OfflineModeIsEnabled):
            raise OutputError("HF_HUB_OFFLINE is set, which forbids every connection to the Hub: unset it to push") from error
        if isinstance(cause, HTTPError | ConnectionError):
            raise OutputError(f"the connection to the Hub failed ({type(cause).__name__}): run the same command again") from error
        raise
