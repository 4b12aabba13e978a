"""What a model costs before and after: parameters, multiply-adds, bytes, measured seconds, and what each block has lost."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arch import describe
from .checkpoint import write_plot
from .groups import shape_of
from .reorder import head_width
from .stored import StoredLinear, StoredModule


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One model in numbers."""

    parameters: int
    """Tied ones once; of packed layers those that they stand for."""
    multiply_adds: int
    """Per token, of all Linears, the head among them; attention's own products, which grow with the text, are left out."""
    num_bytes: int
    """Of all tensors, tied ones once."""
    blocks: dict[str, dict[str, int]]
    """Block -> `parameters`, and where the family is known `channels`, `query_heads`, `kv_heads`."""
    prefill_seconds: float | None = None
    """Measured, of a whole prompt."""
    decode_seconds: float | None = None
    """Measured, of one more token."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models side by side.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, vocab_size=8, num_attention_heads=2))
    >>> same = Comparison(before=count(tiny), after=count(tiny))
    >>> same.removed()["model.layers.0"]
    {'parameters': 0.0, 'channels': 0.0, 'query_heads': 0.0, 'kv_heads': 0.0}
    """

    before: Footprint
    after: Footprint
    dropped: tuple[str, ...] = ()
    """Blocks that are gone, by their names in the first model. Where none are named, those at the end are missing."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """Inverse of `to_dict`."""
        before, after = (Footprint(**values[name]) for name in ("before", "after"))
        return cls(before=before, after=after, dropped=tuple(values["dropped"]))

    def removed(self) -> dict[str, dict[str, float]]:
        """Block of the first model -> share that is gone, by kind."""
        left = iter(self.after.blocks.values())
        found = {}
        for name, old in self.before.blocks.items():
            new = {} if name in self.dropped else next(left, {})
            found[name] = {kind: 1 - new.get(kind, 0) / number for kind, number in old.items() if number}
        return found

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, after / before) for every number that both have."""
        units = {
            "parameters": ("parameters, millions", 1e6, ".3f"), "multiply_adds": ("multiply-adds per token, millions", 1e6, ".3f"),
            "num_bytes": ("MB", 1e6, ".3f"), "prefill_seconds": ("prefill, ms", 1e-3, ".2f"),
            "decode_seconds": ("one token, ms", 1e-3, ".2f"),
        }  # fmt: skip
        rows = []
        for field, (label, unit, form) in units.items():
            old, new = getattr(self.before, field), getattr(self.after, field)
            if old and new is not None:
                rows.append((label, f"{old / unit:{form}}", f"{new / unit:{form}}", f"{new / old:.3f}"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what each block has lost."""
        return asdict(self) | {"dropped": list(self.dropped), "removed": self.removed()}

    def to_markdown(self) -> str:
        """The numbers as a Markdown table."""
        lines = ["| | before | after | × |", "|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in self.rows())]
        return "\n".join(lines) + "\n"

    def to_table(self, title: str) -> Table:
        """The numbers as a rich table."""
        table = Table(title=title)
        for column in ("", "before", "after", "×"):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        return table

    def plot(self, path: Path) -> None:
        """A PNG: for every block of the first model the share of its units and parameters that is gone."""
        from matplotlib.figure import Figure  # here, because no other step needs the memory it takes

        removed = self.removed()
        kinds = [
            kind for kind in ("channels", "query_heads", "kv_heads", "parameters") if any(kind in of for of in removed.values())
        ]
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            places = [position - 0.4 + (number + 0.5) * width for position in range(len(removed))]
            axes.bar(places, [100 * of.get(kind, 0) for of in removed.values()], width, label=kind.replace("_", " "))
        axes.set_xlabel("block")
        axes.set_ylabel("removed, %")
        axes.set_ylim(0, 100)
        axes.legend(ncols=len(kinds), fontsize="small")
        axes.grid(alpha=0.3, axis="y")
        gone = 1 - self.after.parameters / self.before.parameters
        axes.set_title(f"{100 * gone:.1f} % of {self.before.parameters / 1e6:.1f} million parameters removed")
        write_plot(path, figure)


def count(model: PreTrainedModel) -> Footprint:
    """What can be counted without running a model, on meta too.

    Raises:
        UnsupportedModel: as of `describe`.
    """
    arch = describe(model)
    tied = {*model.get_expanded_tied_weights_keys(all_submodels=True), *(f"{name}.weight" for name in arch.tied)}
    head = head_width(model)
    blocks = {}
    for block in arch.blocks:
        found = {"parameters": _parameters(model.get_submodule(block))}
        shapes = {arch.roles[name]: shape_of(model.get_submodule(name)) for name in arch.targets(block)} if arch.is_known else {}
        if "down" in shapes:
            found["channels"] = shapes["down"][1]
        if "o" in shapes:
            found["query_heads"] = shapes["o"][1] // head
        if "k" in shapes:
            found["kv_heads"] = shapes["k"][0] // head
        blocks[block] = found
    return Footprint(
        parameters=_parameters(model, tied),
        multiply_adds=_multiply_adds(model),
        num_bytes=sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in tied),
        blocks=blocks,
    )


def _parameters(module: nn.Module, tied: Collection[str] = ()) -> int:
    plain = sum(parameter.numel() for name, parameter in module.named_parameters() if name not in tied)
    packed = [m for name, m in module.named_modules() if isinstance(m, StoredModule) and f"{name}.weight" not in tied]
    return plain + sum(m.out_features * m.in_features for m in packed)


def _multiply_adds(model: nn.Module) -> int:
    total = 0
    factored: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(factored):
            continue
        if hasattr(module, "num_multiply_adds"):
            total, factored = total + module.num_multiply_adds, (*factored, f"{name}.")
        elif isinstance(module, nn.Linear | Conv1D | StoredLinear):
            total += shape_of(module)[0] * shape_of(module)[1]
    return total
