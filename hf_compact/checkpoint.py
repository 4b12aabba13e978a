"""Files: streaming reads of a dense checkpoint, shards written one by one, and the journal that makes a run resumable.

A run works in `<output>.partial`. Each finished unit (everything outside the blocks, then block after block) is one
shard, written under a temporary name, synced and renamed; then one line is appended to the journal. The folder gets
its real name when nothing is missing, so a folder of that name is always complete.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from .arch import as_linear
from .errors import FormatError, NumericalError, OutputError
from .stored import tied_parts

logger = logging.getLogger(__name__)

#: Version of the modules table in `config.json`.
FORMAT_VERSION = 1
QUANT_METHOD = "hf_compact"
#: How torch names the dtypes of a safetensors header.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
REPORT_NAME = "compression_report.json"
INDEX_NAME = "model.safetensors.index.json"
_PIECE = 1 << 20  # values that are checked at a time
_JOURNAL_NAME = "journal.jsonl"
#: The most that a shard takes beside its tensors and their entries: length of the header, metadata, padding.
SHARD_BYTES = 8 + len('{"__metadata__":{"format":"pt"}}') + 7
_ENTRY_KEYS = {"unit", "file", "sha256", "modules", "layers", "notes"}


class TensorSource:
    """Tensors of safetensors files, read one at a time; nothing stays resident.

    Raises:
        FormatError: a file is damaged.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers of all files."""
        self.files = list(files)
        self.file_of: dict[str, Path] = {}
        self.stored_name: dict[str, str] = {}
        for path in self.files:
            with _open(path) as handle:
                self.file_of.update(dict.fromkeys(handle.keys(), path))
        self.stored_name = {name: name for name in self.file_of}

    def rename_for(self, model: PreTrainedModel) -> Self:
        """Answer to the model's own tensor names from now on.

        Raises:
            FormatError: see `keys_by_model`.
        """
        stored = keys_by_model(model, self.file_of)
        self.file_of = {new: self.file_of[old] for new, old in stored.items()}
        self.stored_name = stored
        return self

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """The files that transformers reads: `model.safetensors`, else what the index names, else all there are.

        Raises:
            FormatError: there is none, or one is damaged or named in the index but missing.
        """
        single, index = folder / "model.safetensors", folder / INDEX_NAME
        if single.exists():
            return cls([single])
        if index.exists():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{index} is no index of shards, or only a part of one: {type(error).__name__}") from error
            files = [folder / name for name in sorted(names)]
            for path in files:
                if not path.exists():
                    raise FormatError(f"{folder} lacks the shard {path.name}, which its index names")
            return cls(files)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FormatError(f"{folder} holds no .safetensors file")
        return cls(files)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, members in by_file.items():
            with _open(path) as handle:
                tensors |= {name: handle.get_tensor(self.stored_name[name]).clone() for name in members}
        return tensors

    def headers(self) -> dict[str, tuple[str, list[int], int]]:
        """Name -> (dtype, shape, bytes), without reading data.

        Raises:
            FormatError: a dtype is not known.
        """
        found = {}
        for path in self.files:
            with _open(path) as handle:
                for name in (name for name, file in self.file_of.items() if file == path):
                    part = handle.get_slice(self.stored_name[name])
                    dtype, shape = part.get_dtype(), part.get_shape()
                    if dtype not in DTYPES:
                        raise FormatError(f"{name} in {path} has the dtype {dtype}, known are {', '.join(DTYPES)}")
                    found[name] = (dtype, shape, DTYPES[dtype].itemsize * torch.Size(shape).numel())
        return found

    def check_finite(self) -> None:
        """Raise NumericalError for the first float tensor with a NaN or an infinity."""
        for name, (_, shape, _) in self.headers().items():
            rows = max(1, _PIECE // max(1, torch.Size(shape[1:]).numel()))
            bad = 0
            for start in range(0, shape[0] if shape else 1, rows):
                with _open(self.file_of[name]) as handle:  # opened anew for each piece: pages stay resident until it is closed
                    stored = self.stored_name[name]
                    bad += _num_not_finite(handle.get_slice(stored)[start : start + rows] if shape else handle.get_tensor(stored))
            _refuse(name, bad)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Compare the headers with a skeleton.

        Raises:
            FormatError: a tensor that the model needs is missing or has another shape.
        """
        headers = self.headers()
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        for name, tensor in model.state_dict().items():
            if name not in headers:
                if tensor.is_meta and name not in tied:
                    raise FormatError(f"the checkpoint lacks {name}, which {type(model).__name__} needs")
            elif tuple(headers[name][1]) != tuple(tensor.shape):
                raise FormatError(f"{name} has the shape {headers[name][1]} in the checkpoint, {list(tensor.shape)} in the model")


def keys_by_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's own tensor names -> names in the files, through the renamings that transformers applies on loading.

    Raises:
        FormatError: a tensor is not renamed but computed from others on loading.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    keys = {}
    for name in stored:
        new, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise FormatError(f"{name} is converted by transformers while loading, not only renamed")
        keys[new] = name
    return keys


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericalError if a weight holds a NaN or an infinity."""
    _refuse(name, _num_not_finite(tensor))


def _num_not_finite(tensor: Tensor) -> int:
    """In pieces: the masks of a whole embedding would take more memory than the embedding."""
    if not tensor.is_floating_point():
        return 0
    return sum(len(part) - int(part.isfinite().sum()) for part in tensor.flatten().split(_PIECE))


def _refuse(name: str, bad: int) -> None:
    if bad:
        raise NumericalError(f"{name} holds {bad} values that are not finite: weights must be finite to be compressed")


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def hash_model(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of what decides the numbers of a model or an adapter: its weights and its config."""
    paths = [*folder.glob("*.safetensors"), folder / "config.json", folder / "adapter_config.json"]
    return {path.name: hash_files([path]) for path in sorted(paths) if path.is_file()}


def check_layers(specs: Mapping[str, Mapping[str, Any]], layers: Mapping[str, type[nn.Module]]) -> None:
    """Check that every spec of a modules table names a known layer.

    Raises:
        FormatError: it does not.
    """
    for name, spec in specs.items():
        if spec.get("layer") not in layers:
            raise FormatError(f"modules[{name!r}].layer must be one of {sorted(layers)}, got {spec.get('layer')!r}")


def rebuild_(model: nn.Module, specs: Mapping[str, Mapping[str, Any]], layers: Mapping[str, type[nn.Module]]) -> None:
    """Replace modules by the empty ones that a modules table describes, in place (also on meta).

    The order is the table's, but what is part of another module comes after it, and tied modules come last: `config.json`
    sorts its keys, and they share what is there.

    Args:
        model: holds a module for every name, dense or compressed before.
        specs: module name -> `{"layer": class name, **settings}`; `tied_to` names the module whose buffers it shares.
        layers: class name -> class with `empty_like(old, **settings)`.

    Raises:
        FormatError: a spec names an unknown layer or module, or settings that the layer does not take.
    """
    check_layers(specs, layers)
    for name, spec in sorted(specs.items(), key=lambda item: ("tied_to" in item[1], item[0].count("."))):
        settings = {key: value for key, value in spec.items() if key not in ("layer", "tied_to")}
        try:
            old = model.get_submodule(name)
            new = layers[spec["layer"]].empty_like(as_linear(old) if isinstance(old, Conv1D) else old, **settings)
            if "tied_to" in spec:
                share_buffers_(new, model.get_submodule(spec["tied_to"]))
        except (AttributeError, TypeError, KeyError, ValueError, RuntimeError, ArithmeticError) as error:
            raise FormatError(f"modules[{name!r}] = {dict(spec)} does not fit the model: {error}") from error
        model.set_submodule(name, new)
        for key, value in getattr(new, "owner_attributes", {}).items():
            setattr(model.get_submodule(name.rpartition(".")[0]), key, value)
    for name, spec in specs.items():  # what they share is there by now
        try:
            tie_parts_(model, name)
        except (AttributeError, ValueError) as error:
            raise FormatError(f"modules[{name!r}] = {dict(spec)} does not fit the model: {error}") from error


def tie_parts_(model: nn.Module, name: str) -> None:
    """Make the tied parts of a module hold the very parameters they name, as transformers ties a head to an embedding.

    A part that a later stage has compressed is in the table itself, with `tied_to`.

    Raises:
        AttributeError: a tie names no module of the model.
        ValueError: the shapes differ.
    """
    module = model.get_submodule(name)
    for part, source in tied_parts(module).items():
        mine, theirs = module.get_submodule(part), model.get_submodule(source)
        if isinstance(mine, nn.Linear) and isinstance(theirs, nn.Linear):
            if mine.weight.shape != theirs.weight.shape:
                raise ValueError(f"{part} is {list(mine.weight.shape)}, {source} is {list(theirs.weight.shape)}")
            mine.weight = theirs.weight


def share_buffers_(target: nn.Module, source: nn.Module) -> None:
    """Make `target` hold the very tensors of `source`, as a tied head does, and leave them out of its state.

    On another device than the source it holds copies.
    """
    for name, buffer in source._buffers.items():
        if buffer.is_meta and name in source._non_persistent_buffers_set:
            continue  # comes into being after loading, and is shared then
        target._buffers[name] = buffer.to(target._buffers[name].device) if not target._buffers[name].is_meta else buffer
        target._non_persistent_buffers_set.add(name)


class Journal:
    """The folder of an unfinished run: shards and one line of JSON for each.

    The first line is the fingerprint of everything that decides the result. A journal with another fingerprint is
    refused, and so is a second process while the first one is at it, so two runs can never mix. As a context it gives the folder free
    at the end, as does the end of the process.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], num_units: int) -> None:
        """Open or create `<output>.partial`.

        Raises:
            OutputError: the output exists and is not empty, cannot be created, belongs to another run, or is being written by another
                process.
        """
        self.output, self.num_units = output, num_units
        self.folder = output.with_name(output.name + ".partial")
        self.entries: list[dict[str, Any]] = []
        is_named = (output / _JOURNAL_NAME).exists()  # killed after the folder got its name, before it was verified
        if not is_named:
            check_output(output)
        place = output if is_named else self.folder
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        self._free = weakref.finalize(self, os.close, _locked(place))
        try:
            self._open(place, dict(fingerprint))
        except BaseException:
            self._free()
            raise

    def _open(self, place: Path, fingerprint: dict[str, Any]) -> None:
        lines = self._earlier(place, fingerprint)
        if place == self.output:
            place.rename(self.folder)
        if len(lines) > 1:
            self._resume(lines)
            return
        with disk_errors(self.folder):
            write_text(self.folder / _JOURNAL_NAME, json.dumps({"fingerprint": fingerprint}) + "\n")

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Others may write to the folder from now on."""
        self._free()

    @staticmethod
    def _earlier(place: Path, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of the journal, of this very run; none of a new one."""
        path = place / _JOURNAL_NAME
        lines = _complete_lines(path) if path.exists() else []
        if path.exists() and not lines:
            raise OutputError(f"{place} has a journal that cannot be read: choose another --output or delete the folder")
        if len(lines) > 1:  # else nothing is finished that could be mixed up
            advice = "finish that run, choose another --output, or delete the folder"
            check_same_run(place, lines[0]["fingerprint"], fingerprint, advice)
        return lines

    def _resume(self, lines: list[dict[str, Any]]) -> None:
        for entry in lines[1:]:
            shard = self.shard_path(len(self.entries))
            if shard.name != entry["file"] or not shard.exists() or hash_files([shard]) != entry["sha256"]:
                logger.warning("%s is damaged; going on from its unit %r", shard.name, entry["unit"])
                break
            self.entries.append(entry)
        if any(entry.get("is_replaced") for entry in self.entries) and not self.is_replaced:
            logger.warning("%s was left while its units were written for the second time; starting over", self.folder)
            self.entries = []
        kept = [lines[0], *self.entries]
        write_text(self.folder / _JOURNAL_NAME, "".join(json.dumps(line) + "\n" for line in kept))
        logger.info("resuming after %d of %d units", len(self.entries), self.num_units)

    def shard_path(self, index: int) -> Path:
        """File of the shard with this index, counted from 0."""
        return self.folder / f"model-{index + 1:05d}-of-{self.num_units:05d}.safetensors"

    def append(self, unit: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write one finished unit: its shard by atomic rename, then its journal line.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        shard = self.shard_path(len(self.entries))
        with disk_errors(self.folder):
            write_shard(shard, tensors)
            entry = {"unit": unit, "file": shard.name, "sha256": hash_files([shard]), **record}
            with (self.folder / _JOURNAL_NAME).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        self.entries.append(entry)

    def replace(self, position: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a finished unit again after the whole model was changed.

        A run that is killed between two of these starts over: what it has is neither the one state nor the other.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        entry = self.entries[position]
        with disk_errors(self.folder):
            shard = self.folder / entry["file"]
            write_shard(shard, tensors)
            self.entries[position] = {**entry, **record, "sha256": hash_files([shard]), "is_replaced": True}
            lines = _complete_lines(self.folder / _JOURNAL_NAME)[:1] + self.entries
            write_text(self.folder / _JOURNAL_NAME, "".join(json.dumps(line) + "\n" for line in lines))

    @property
    def is_replaced(self) -> bool:
        """Whether every unit has been written again."""
        return len(self.entries) == self.num_units and all(entry.get("is_replaced") for entry in self.entries)

    def finish(self, write_side_files: Callable[[Path], None]) -> int:
        """Write the index and the side files and give the folder its real name; the journal stays until `close`.

        Returns:
            Bytes of all safetensors files.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for entry in self.entries:
            path = self.folder / entry["file"]
            with _open(path) as handle:
                weight_map |= dict.fromkeys(handle.keys(), path.name)
            total += path.stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with disk_errors(self.folder):
            write_side_files(self.folder)
            write_text(self.folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
            if self.output.exists():
                self.output.rmdir()
            self.folder.rename(self.output)
        return total

    def close(self) -> None:
        """End the run: the output is scored, or marked as unverified, and is never resumed again."""
        (self.output / _JOURNAL_NAME).unlink()

    @staticmethod
    def is_unfinished(output: Path) -> bool:
        """Whether a run into this output was stopped before its end."""
        return any((folder / _JOURNAL_NAME).exists() for folder in (output, output.with_name(output.name + ".partial")))


def _locked(folder: Path) -> int:
    """A descriptor that keeps other processes off a folder, under whatever name, until it is closed or the process ends.

    Raises:
        OutputError: another one does that.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{folder} is being written by another process: wait for it, or choose another --output") from None
    except OSError as error:  # as on NFS, which does not lock folders
        logger.warning("%s cannot be locked (%s): see to it that no other process writes to it", folder, error.strerror)
    return descriptor


def check_same_run(place: Path, earlier: Mapping[str, Any], fingerprint: Mapping[str, Any], advice: str) -> None:
    """Raise OutputError, naming what differs, if what lies at a place was not made from the same things."""
    for key in fingerprint:
        if earlier.get(key) != fingerprint[key]:
            raise OutputError(
                f"{place} belongs to a run with another {key} ({_short(earlier.get(key))}, now {_short(fingerprint[key])}): {advice}"
            )


def check_new_file(path: Path) -> None:
    """Raise OutputError unless a file can be created there without taking another's place."""
    folder = path.absolute().parent
    if path.exists():
        raise OutputError(f"output {str(path)!r} exists: choose another name or delete it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"output {str(path)!r} cannot be created: its folder must exist and be writable")


def header_bytes(name: str, tensor: Tensor, file_bytes: int) -> int:
    """The most that a tensor takes in the header of a safetensors file of at most so many bytes.

    >>> header_bytes("a", torch.zeros(2, 3), 99) == len('"a":{"dtype":"F32","shape":[2,3],"data_offsets":[10,34]},')
    True
    """
    dtype = next(kind for kind, dtype in DTYPES.items() if dtype == tensor.dtype)
    entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [file_bytes, file_bytes]}
    return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1


def check_output(output: Path) -> None:
    """Raise OutputError unless the output is absent or an empty folder below a folder that can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"output {str(output)!r} exists and is not an empty folder: choose another --output or delete it")
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output {str(output)!r} cannot be created: {parent} is not a folder that can be written")


def check_new_folder(output: Path) -> Path:
    """The folder in which what is to be the output is written; OutputError if one of the two holds something or cannot be made."""
    output = output.absolute()  # "." has no name to add to
    partial = output.with_name(output.name + ".partial")
    for path in (output, partial):
        check_output(path)
    return partial


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name of the output at the end; nothing is left of it after an error.

    Raises:
        OutputError: the output or its partial folder holds something, or the disk is full or cannot be written.
    """
    output, partial = output.absolute(), check_new_folder(output)
    try:
        with disk_errors(output, "run the same command again: what was written is deleted"):
            yield partial
            output.rmdir() if output.exists() else None
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, whose file takes the path at the end: what lies there is the old file, or the new one, or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either complete or absent."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_plot(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib, as the kind of picture that the path's ending says, so that it is complete or absent."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise FormatError(f"{path} is not a complete safetensors file: {error}") from error


@contextmanager
def disk_errors(
    folder: Path, advice: str = "run the same command again, it goes on from the last finished block"
) -> Iterator[None]:
    """Turn what the file system says into one line that names the folder, and what to do once there is space."""
    try:
        yield
    except Exception as error:
        # The package tokenizers raises Exception itself, with the words of the system.
        is_tokenizers = type(error) is Exception and "os error" in str(error)
        if not isinstance(error, OSError | SafetensorError) and not is_tokenizers:
            raise
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower()
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        if is_full:
            raise OutputError(
                f"disk full while writing {folder} ({free / 1e6:.0f} MB free): free some space and {advice}"
            ) from error
        raise OutputError(f"{folder} cannot be written ({free / 1e6:.0f} MB free): {error}") from error


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal up to the first that is not whole, which a crash may leave at the end."""
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if (
            not line.endswith(b"\n")
            or not isinstance(entry, dict)
            or not entry.keys() >= (_ENTRY_KEYS if lines else {"fingerprint"})
        ):
            break
        lines.append(entry)
    return lines


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it is the old one, or the new one, or none."""
    with whole_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:40] + "…" + hashlib.sha256(text.encode()).hexdigest()[:12]
