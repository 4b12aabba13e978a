"""Compressing to a folder that is interrupted, and goes on."""

from pathlib import Path

import pytest
import torch

import hf_compact
from hf_compact import Report
from hf_compact.checkpoint import Journal, TensorSource

ORIGINAL_APPEND = Journal.append


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run when so many units are written."""

    def append(self, *args):
        if len(self.entries) == count:
            raise KeyboardInterrupt
        ORIGINAL_APPEND(self, *args)

    monkeypatch.setattr(Journal, "append", append)


def ends_with_the_same_bytes(model: Path, recipe: dict, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Compress to `folder/whole` in one go and to `folder/killed` in two, and compare; returns the report of the former."""
    report = hf_compact.compress(model, recipe, output=folder / "whole", calibration=[text])
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        hf_compact.compress(model, recipe, output=folder / "killed", calibration=[text])
    monkeypatch.setattr(Journal, "append", ORIGINAL_APPEND)
    hf_compact.compress(model, recipe, output=folder / "killed", calibration=[text])
    first, second = (TensorSource.in_folder(folder / name) for name in ("whole", "killed"))
    a, b = first.read(first.file_of), second.read(second.file_of)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    return report
