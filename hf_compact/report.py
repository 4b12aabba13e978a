"""What a run did, in numbers read from tensors and files: per layer and in all, as JSON, Markdown and a rich table."""

import ctypes
import json
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from .errors import FormatError

#: Version of the schema of `compression_report.json`, documented in `docs/report.md`.
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One compressed module."""

    name: str
    """Whole module name."""
    role: str
    """What the module does: q, up, embedding, head …"""
    method: str
    """Method that made it."""
    num_weights: int
    """Weights of the dense module, bias not counted."""
    compressed_bytes: int
    """Bytes of all tensors that replace the weight: codes, scales, offsets, tables."""
    relative_error: float
    """Share of the output energy on the calibration inputs that is lost; of the weight's energy without inputs."""
    seconds: float
    """Time of the solver."""
    operations_ratio: float | None = None
    """Multiply-adds per token, compressed / dense; None where the weight is unpacked and multiplied as a dense one."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per dense weight, every scale and table counted."""
        return 8 * self.compressed_bytes / self.num_weights


@dataclass(kw_only=True)
class Report:
    """A whole run. Fields that a stage of the run has not reached are None."""

    model: str
    """Name or path of the dense model as the user gave it."""
    family: str
    """`config.model_type`."""
    is_plain: bool = False
    """Whether the folder is an ordinary model that loads without this library: units were removed, nothing else."""
    auto_class: str = "AutoModel"
    """The Auto class of transformers that loads the folder as what it was."""
    recipe: dict[str, Any]
    """The recipe with every default written out."""
    calibration: dict[str, Any] | None = None
    """Sources, tokens and SHA-256 of the calibration set."""
    layers: list[LayerReport] = field(default_factory=list)
    """In the order they were compressed."""
    num_parameters: int = 0
    """Parameters of the dense model, tied ones counted once."""
    file_bytes: int | None = None
    """Bytes of all safetensors files of the compressed model, headers included."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""
    peak_memory_bytes: int = 0
    """Largest resident set of the compressing process."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decide the result."""
    reconstruction: dict[str, list[float]] = field(default_factory=dict)
    """Block -> mean share of its output's energy that is lost, in the first and the last epoch of its reconstruction."""
    distillation: dict[str, Any] | None = None
    """Steps, and the mean loss of the first and the last eight, in nats per token."""
    footprint: dict[str, Any] | None = None
    """Where units were removed: what the model costs before and after, and what each block has lost."""
    verification: dict[str, Any] | None = None
    """What the fresh process found: `verified`, largest logit difference, perplexity, SHA-256 of the files."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know: a family read by structure, layers that never saw an input."""

    @property
    def body(self) -> list[LayerReport]:
        """The layers inside blocks."""
        return [layer for layer in self.layers if layer.role not in ("embedding", "head")]

    @property
    def body_bits_per_weight(self) -> float:
        """Mean bits of the compressed weights inside blocks."""
        weights = sum(layer.num_weights for layer in self.body)
        return 8 * sum(layer.compressed_bytes for layer in self.body) / weights if weights else 0.0

    @property
    def file_bits_per_weight(self) -> float | None:
        """Bits on disk per dense parameter, everything counted."""
        return None if self.file_bytes is None else 8 * self.file_bytes / self.num_parameters

    @property
    def is_verified(self) -> bool:
        """Whether a fresh process has reloaded and scored the folder."""
        return bool(self.verification and self.verification["verified"])

    def totals(self) -> dict[str, Any]:
        """The derived numbers that readers ask for first."""
        return {
            "body_bits_per_weight": self.body_bits_per_weight,
            "file_bits_per_weight": self.file_bits_per_weight,
            "fp32_bytes": 4 * self.num_parameters,
            "bf16_bytes": 2 * self.num_parameters,
            "share_of_fp32": None if self.file_bytes is None else self.file_bytes / (4 * self.num_parameters),
            "share_of_bf16": None if self.file_bytes is None else self.file_bytes / (2 * self.num_parameters),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the schema version and the derived totals."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "totals": self.totals()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Inverse of `to_dict`.

        Raises:
            FormatError: another schema version, or fields that do not belong to it.
        """
        if not isinstance(values, dict):
            raise FormatError(f"compression report must be a mapping, got {type(values).__name__}")
        values = dict(values)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise FormatError(f"compression report schema_version must be {SCHEMA_VERSION}, got {version!r}")
        values.pop("totals", None)
        try:
            values["layers"] = [LayerReport(**layer) for layer in values["layers"]]
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise FormatError(f"compression report does not fit its schema: {error}") from error

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read `compression_report.json`.

        Raises:
            FormatError: the file is missing or is not a report.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FormatError(f"compression report {path} cannot be read: {error}") from error

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (label, value) pairs."""
        totals = self.totals()
        rows = [
            ("model", self.model),
            ("body", f"{self.body_bits_per_weight:.3f} bits per weight"),
        ]
        if self.file_bytes is not None:
            rows += [
                ("whole file", f"{self.file_bits_per_weight:.3f} bits per weight"),
                ("bytes on disk", format_bytes(self.file_bytes)),
                ("vs fp32", f"{100 * totals['share_of_fp32']:.1f} % of {format_bytes(totals['fp32_bytes'])}"),
                ("vs bf16", f"{100 * totals['share_of_bf16']:.1f} % of {format_bytes(totals['bf16_bytes'])}"),
            ]
        rows += [(f"{phase}", f"{seconds:.1f} s") for phase, seconds in self.seconds.items()]
        rows.append(("peak memory", format_bytes(self.peak_memory_bytes)))
        if self.verification:
            rows.append(("verified", "yes, in a fresh process" if self.is_verified else "NO"))
            if self.verification.get("perplexity") is not None:
                rows.append(("perplexity of held-out text", f"{self.verification['perplexity']:.2f}"))
        return rows

    def to_markdown(self) -> str:
        """The summary as a Markdown table."""
        return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in self.rows())]) + "\n"

    def to_table(self, title: str = "Compressed") -> Table:
        """The summary as a rich table."""
        table = Table(title=title, show_header=False)
        for row in self.rows():
            table.add_row(*row)
        return table


@dataclass
class CommReport:
    """Bytes that one rank sends in data-parallel training, by phase and kind, against exact float32 gradients.

    Bytes are what the collectives' algorithms send from each rank: `2 (n - 1) / n` of the buffer for an all-reduce (ring),
    the messages to others for an all-to-all and an all-gather. Headers of the network come on top.

    >>> report = CommReport(num_values=1000, world_size=2); report.add_all_reduce("gradients", 4000); report.end_step()
    >>> report.bytes_per_step(), report.reduction()
    (4000.0, 1.0)
    """

    num_values: int = 0
    """Trained parameters."""
    world_size: int = 1
    """Ranks."""
    phase: str = "warm-up"
    """What is counted now."""
    sent_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Phase -> kind -> bytes in all steps."""
    num_steps: dict[str, int] = field(default_factory=dict)
    """Phase -> optimizer steps."""

    def add(self, kind: str, num_bytes: float) -> None:
        """Count bytes that this rank sends now."""
        kinds = self.sent_bytes.setdefault(self.phase, {})
        kinds[kind] = kinds.get(kind, 0) + num_bytes

    def add_all_reduce(self, kind: str, buffer_bytes: float) -> None:
        """Count an all-reduce of a buffer of that size."""
        self.add(kind, 2 * (self.world_size - 1) / self.world_size * buffer_bytes)

    def end_step(self) -> None:
        """Count a step of the optimizer."""
        self.num_steps[self.phase] = self.num_steps.get(self.phase, 0) + 1

    @property
    def total_bytes(self) -> float:
        """What this rank has sent in all."""
        return sum(sum(kinds.values()) for kinds in self.sent_bytes.values())

    @property
    def dense_bytes_per_step(self) -> float:
        """What an all-reduce of float32 gradients sends from each rank."""
        return 2 * (self.world_size - 1) / self.world_size * 4 * self.num_values

    def bytes_per_step(self, phase: str | None = None) -> float:
        """Mean bytes that this rank sends in a step of a phase, of all phases by default."""
        phases = list(self.num_steps) if phase is None else [phase]
        steps = sum(self.num_steps.get(name, 0) for name in phases)
        return sum(sum(self.sent_bytes.get(name, {}).values()) for name in phases) / steps if steps else 0.0

    def reduction(self, phase: str | None = None) -> float:
        """How many times fewer bytes than float32 gradients; 1 where nothing is sent."""
        sent = self.bytes_per_step(phase)
        return self.dense_bytes_per_step / sent if sent else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the derived ones."""
        derived = {
            phase: {"bytes_per_step": self.bytes_per_step(phase), "reduction": self.reduction(phase)} for phase in self.num_steps
        }
        whole = {"bytes_per_step": self.bytes_per_step(), "reduction": self.reduction()}
        return asdict(self) | {"dense_bytes_per_step": self.dense_bytes_per_step, "by_phase": derived, "whole": whole}

    def to_table(self) -> Table:
        """Phase by phase, kind by kind, as a rich table."""
        dense = f"{self.dense_bytes_per_step / 1e6:.3f} MB"
        table = Table(title=f"Sent by each of {self.world_size} ranks; exact float32: {dense} per step")
        for column in ("phase", "kind", "steps", "per step", "fewer than float32"):
            table.add_column(column)

        def add(phase: str, kind: str, steps: int, per_step: float, reduction: str) -> None:
            table.add_row(phase, kind, str(steps), f"{per_step / 1e6:.3f} MB", reduction)

        for phase, steps in self.num_steps.items():
            for kind, num_bytes in self.sent_bytes.get(phase, {}).items():
                add(phase, kind, steps, num_bytes / steps, "")
            add(phase, "all", steps, self.bytes_per_step(phase), f"{self.reduction(phase):.1f} ×")
        add("whole run", "all", sum(self.num_steps.values()), self.bytes_per_step(), f"{self.reduction():.1f} ×")
        return table


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far.

    Linux counts the parent's pages into `ru_maxrss` of a process it starts, so the high-water mark of the own memory is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_freed_memory() -> None:
    """Give what is freed back to the system (glibc only; elsewhere nothing happens).

    glibc keeps freed tensors of up to 32 MB for later, which adds up over a run.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def format_bytes(count: float) -> str:
    """Decimal megabytes, as disks and the Hub count them.

    >>> format_bytes(85_200_000)
    '85.2 MB'
    """
    return f"{count / 1e6:.1f} MB"
