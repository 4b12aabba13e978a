"""Writes `codebook.safetensors`: a small weight, its gram matrix, and what the solver makes of them.

Run it only when the solver is meant to give other numbers, and say in the commit why: `python tests/golden/make_codebook.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_compact import CodebookConfig
from hf_compact.functional.gram import add_gram_
from hf_compact.methods.codebook.apply import quantize
from hf_compact.methods.codebook.functional import dequantize

FILE = Path(__file__).with_name("codebook.safetensors")
SETTINGS = {
    "uniform_4bit": CodebookConfig(bits=4, group_size=20, scale_bits=None, damp=0.01),
    "learned_3bit": CodebookConfig(
        bits=3, grid="learned", group_size=None, rows_per_codebook=5, scale_bits=None, damp=0.02, symmetric=True
    ),
    "joint_3bit": CodebookConfig(bits=3, grid="learned", group_size=16, rows_per_codebook=8, learning="soft", learning_steps=20),
    "nf4_nearest": CodebookConfig(grid="nf4", group_size=16, scale_bits=None, rounding="nearest"),
}


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few heavy columns `[16, 48]` and the gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 48, generator=generator) * (1 + torch.rand(48, generator=generator).pow(4) * 4)
    inputs = torch.randn(200, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    inputs += 0.3 * torch.randn(200, 48, generator=generator)
    gram = torch.zeros(48, 48, dtype=torch.float64)
    add_gram_(gram, inputs)
    return weight, gram


def solve(weight: torch.Tensor, gram: torch.Tensor, config: CodebookConfig) -> torch.Tensor:
    """The dequantized result."""
    return dequantize(quantize(weight, gram, config), config.group_size)


def main() -> None:
    """Solve every setting and write the file."""
    weight, gram = problem()
    dense = {name: solve(weight, gram, config) for name, config in SETTINGS.items()}
    save_file({"weight": weight, "gram": gram, **dense}, FILE)


if __name__ == "__main__":
    main()
