"""The report: everything that goes in comes out again, and its derived numbers are what their names say."""

import io
import json

import pytest
from rich.console import Console

from hf_compact import CodebookConfig, Recipe, Report
from hf_compact.errors import FormatError
from hf_compact.report import SCHEMA_VERSION, LayerReport, format_bytes, peak_memory_bytes


def layer(name="model.layers.0.mlp.up_proj", role="up", num_weights=1000, compressed_bytes=500) -> LayerReport:
    return LayerReport(
        name=name, role=role, method="codebook", num_weights=num_weights, compressed_bytes=compressed_bytes,
        relative_error=0.01, seconds=0.5,
    )  # fmt: skip


def full_report() -> Report:
    return Report(
        model="org/tiny",
        family="llama",
        recipe=Recipe(stages=(CodebookConfig(),)).to_dict(),
        calibration={"sources": ["a.txt"], "num_tokens": 128, "sha256": "00"},
        layers=[layer("model.embed_tokens", "embedding", 4000, 4100), layer(), layer("lm_head", "head", 500, 500), layer(num_weights=3000, compressed_bytes=1000)],
        num_parameters=10_000,
        file_bytes=8_000,
        seconds={"open": 1.0, "compress": 2.5},
        peak_memory_bytes=123_456_789,
        versions={"torch": "2"},
        verification={"verified": True, "perplexity": 12.345},
        notes=["one note"],
    )  # fmt: skip


def test_round_trip_through_json(tmp_path):
    report = full_report()
    path = tmp_path / "compression_report.json"
    path.write_text(json.dumps(report.to_dict()), encoding="utf-8")
    assert Report.read(path) == report
    assert Report.from_dict(report.to_dict()).to_dict() == report.to_dict()


def test_minimal_report_round_trips():
    report = Report(model="m", family="f", recipe={})
    assert Report.from_dict(report.to_dict()) == report
    assert report.file_bits_per_weight is None
    assert report.body_bits_per_weight == 0
    assert not report.is_verified


def test_from_dict_leaves_its_input():
    values = full_report().to_dict()
    before = json.dumps(values)
    Report.from_dict(values)
    assert json.dumps(values) == before


def test_derived_numbers():
    report = full_report()
    assert layer().bits_per_weight == 4
    assert report.body_bits_per_weight == 8 * 1500 / 4000
    assert report.file_bits_per_weight == 6.4
    assert report.is_verified
    assert report.totals() == {
        "body_bits_per_weight": 3.0, "file_bits_per_weight": 6.4, "fp32_bytes": 40_000, "bf16_bytes": 20_000,
        "share_of_fp32": 0.2, "share_of_bf16": 0.4,
    }  # fmt: skip
    assert report.to_dict()["totals"] == report.totals()


@pytest.mark.parametrize("version", [None, 0, SCHEMA_VERSION + 1, "1"])
def test_other_schema_version(version):
    with pytest.raises(FormatError, match=f"compression report schema_version must be {SCHEMA_VERSION}, got {version!r}"):
        Report.from_dict(full_report().to_dict() | {"schema_version": version})


def test_no_schema_version():
    values = full_report().to_dict()
    del values["schema_version"]
    with pytest.raises(FormatError, match="schema_version must be 1, got None"):
        Report.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"layers": [{"name": "x"}]},
        {"layers": [{**layer().__dict__, "extra": 1}]},
        {"layers": None},
        {"layers": ["x"]},
    ],
    ids=["unknown_field", "layer_lacks_fields", "layer_has_more", "no_layers", "layer_is_text"],
)
def test_fields_of_another_schema(change):
    with pytest.raises(FormatError, match="compression report does not fit its schema"):
        Report.from_dict(full_report().to_dict() | change)


@pytest.mark.parametrize("missing", ["model", "layers", "recipe"])
def test_missing_fields(missing):
    values = full_report().to_dict()
    del values[missing]
    with pytest.raises(FormatError, match=f"compression report does not fit its schema: .*'{missing}'"):
        Report.from_dict(values)


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "null", "3"])
def test_json_of_another_kind(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match="compression report must be a mapping, got"):
        Report.read(path)


@pytest.mark.parametrize("content", [b"{", b"\xff"], ids=["cut", "not_text"])
def test_damaged_file(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"compression report .*report.json cannot be read"):
        Report.read(path)


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match=r"compression report .*none.json cannot be read: .*No such file"):
        Report.read(tmp_path / "none.json")


def test_markdown():
    lines = full_report().to_markdown().splitlines()
    assert lines[:2] == ["| | |", "|---|---|"]
    assert lines[2:] == [
        "| model | org/tiny |",
        "| body | 3.000 bits per weight |",
        "| whole file | 6.400 bits per weight |",
        "| bytes on disk | 0.0 MB |",
        "| vs fp32 | 20.0 % of 0.0 MB |",
        "| vs bf16 | 40.0 % of 0.0 MB |",
        "| open | 1.0 s |",
        "| compress | 2.5 s |",
        "| peak memory | 123.5 MB |",
        "| verified | yes, in a fresh process |",
        "| perplexity of held-out text | 12.35 |",
    ]


def test_failed_verification_is_loud():
    report = full_report()
    report.verification = {"verified": False, "reason": "logits differ"}
    assert not report.is_verified
    assert "| verified | NO |" in report.to_markdown()


def test_minimal_markdown_has_no_empty_numbers():
    text = Report(model="m", family="f", recipe={}).to_markdown()
    assert "None" not in text
    assert "verified" not in text


def test_table():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(full_report().to_table("Small"))
    text = console.export_text()
    for label, value in full_report().rows():
        assert label in text
        assert value in text
    assert "Small" in text


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MB"), (85_200_000, "85.2 MB"), (1_234_567_890, "1234.6 MB")])
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_peak_memory_is_that_of_this_process():
    assert 50e6 < peak_memory_bytes() < 100e9
