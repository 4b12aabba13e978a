"""Calibration text: seeded windows, a held-out end, a hash of everything, and errors that name the file."""

import pytest
import torch

from hf_compact import CalibrationConfig
from hf_compact.calibration import Calibration, builtin_text, from_batches, read_texts, sample, tokenize, windows
from hf_compact.errors import CalibrationError

CONFIG = CalibrationConfig(num_sequences=7, sequence_length=32, batch_size=3)


@pytest.fixture(scope="module")
def text() -> str:
    return builtin_text("calibration")[:20_000]


def draw(tokenizer, text, seed=0, config=CONFIG) -> Calibration:
    return sample(tokenizer, text, config, seed, ["a.txt"])


def is_window_of(row: torch.Tensor, ids: torch.Tensor) -> bool:
    return bool((ids.unfold(0, len(row), 1) == row).all(1).any())


def test_batches_have_the_asked_sizes(tokenizer, text):
    found = draw(tokenizer, text)
    assert [tuple(batch["input_ids"].shape) for batch in found.batches] == [(3, 32), (3, 32), (1, 32)]
    assert found.num_tokens == 7 * 32
    assert found.sources == ("a.txt",)


def test_sequences_are_windows_of_the_text_before_the_held_out_end(tokenizer, text):
    found = draw(tokenizer, text)
    ids = tokenize(tokenizer, text)
    assert torch.equal(ids[-len(found.held_out) :], found.held_out)
    rest = ids[: -len(found.held_out)]
    assert all(is_window_of(row, rest) for batch in found.batches for row in batch["input_ids"])


def test_a_tenth_is_held_out_up_to_2048_tokens(tokenizer, text):
    ids = tokenize(tokenizer, text)
    assert len(draw(tokenizer, text).held_out) == len(ids) // 10
    long = builtin_text("calibration")[:60_000]
    assert len(tokenize(tokenizer, long)) > 20_480
    assert len(draw(tokenizer, long).held_out) == 2048


def test_same_seed_same_set(tokenizer, text):
    first, second, other = (draw(tokenizer, text, seed) for seed in (0, 0, 1))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint


def test_batch_size_does_not_change_the_sequences(tokenizer, text):
    together = draw(tokenizer, text, config=CalibrationConfig(num_sequences=7, sequence_length=32, batch_size=7))
    assert torch.equal(
        torch.cat([batch["input_ids"] for batch in draw(tokenizer, text).batches]), together.batches[0]["input_ids"]
    )


def test_global_random_state_is_left_alone(tokenizer, text):
    before = torch.random.get_rng_state()
    draw(tokenizer, text)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_special_tokens(tokenizer):
    ids = tokenize(tokenizer, "def compact(model): return model")
    assert ids.dtype == torch.int64
    assert not set(ids.tolist()) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokenizer.decode(ids) == "def compact(model): return model"


@pytest.mark.parametrize("num_characters", [5, 15])
def test_text_is_too_short(tokenizer, num_characters):
    message = r"calibration text has \d+ tokens, too few for calibration.sequence_length 32 and a tenth held out: give more text"
    with pytest.raises(CalibrationError, match=message):
        draw(tokenizer, "abcdefghij" * (num_characters // 5))


def test_shortest_text(tokenizer):
    text = "".join(chr(33 + i % 80) for i in range(60))
    length = len(tokenize(tokenizer, text))
    longest = length - length // 10 - 1
    found = draw(tokenizer, text, config=CalibrationConfig(num_sequences=4, sequence_length=longest, batch_size=2))
    assert found.num_tokens == 4 * longest
    with pytest.raises(CalibrationError, match=r"too few for calibration.sequence_length"):
        draw(tokenizer, text, config=CalibrationConfig(num_sequences=4, sequence_length=longest + 1, batch_size=2))


# Files.


def test_files_are_joined_in_order(tmp_path):
    for name, content in (("b.txt", "zwei"), ("a.txt", "eins: ä")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == "zwei\neins: ä"


def test_file_is_missing(tmp_path):
    with pytest.raises(CalibrationError, match=r"text '.*none.txt' cannot be read: .*No such file"):
        read_texts([tmp_path / "none.txt"])


def test_file_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"text '.*latin.txt' cannot be read: .*decode"):
        read_texts([tmp_path / "latin.txt"])


def test_file_is_empty(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"text '.*empty.txt' is empty: calibration and evaluation need UTF-8 text"):
        read_texts([tmp_path / "empty.txt"])


def test_builtin_parts_are_disjoint():
    parts = {part: builtin_text(part) for part in ("calibration", "evaluation")}
    assert all(len(part) > 100_000 for part in parts.values())
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} for part in parts.values()]
    assert min(map(len, paragraphs)) > 100
    assert not paragraphs[0] & paragraphs[1]


def test_builtin_end_is_no_copy_of_its_beginning():
    text = builtin_text("calibration")
    border = text.index("\n\n", len(text) * 9 // 10)
    beginning, end = ({" ".join(p.split()) for p in part.split("\n\n")} for part in (text[:border], text[border:]))
    assert len(end) > 10
    assert not beginning & end


# Windows and ready batches.


@pytest.mark.parametrize(("length", "count", "expected"), [(4, None, 2), (4, 1, 1), (4, 9, 2), (10, None, 1), (11, None, 0)])
def test_windows_are_consecutive(length, count, expected):
    found = list(windows(torch.arange(10), length, count))
    assert len(found) == expected
    for number, window in enumerate(found):
        assert window.tolist() == [list(range(number * length, (number + 1) * length))]


def test_ready_batches():
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    found = from_batches([batch], "images")
    assert found.batches == (batch,)
    assert found.batches[0] is not batch
    assert found.sources == ("images",)
    assert found.held_out is None


def test_no_batches():
    with pytest.raises(CalibrationError, match="calibration batches must hold at least one batch, got none"):
        from_batches([])


@pytest.mark.parametrize(
    "other",
    [
        [{"a": torch.tensor([[1, 3]])}],
        [{"b": torch.tensor([[1, 2]])}],
        [{"a": torch.tensor([[1], [2]])}],
        [{"a": torch.tensor([[1, 2]], dtype=torch.int32)}],
        [{"a": torch.tensor([[1, 2]])}, {"a": torch.tensor([[1, 2]])}],
    ],
    ids=["value", "name", "shape", "dtype", "number"],
)
def test_fingerprint_sees_every_difference(other):
    batches = [{"a": torch.tensor([[1, 2]])}]
    assert from_batches(batches).fingerprint == from_batches([dict(b) for b in batches]).fingerprint
    assert from_batches(batches).fingerprint != from_batches(other).fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64], ids=str)
def test_fingerprint_of_any_dtype_and_layout(dtype):
    values = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    contiguous, transposed = from_batches([{"a": values.T.contiguous()}]), from_batches([{"a": values.T}])
    assert contiguous.fingerprint == transposed.fingerprint


def test_batches_move_and_stay_the_same_set(tokenizer, text):
    found = draw(tokenizer, text)
    there = found.to("meta")
    assert all(batch["input_ids"].is_meta for batch in there.batches)
    assert [batch["input_ids"].shape for batch in there.batches] == [batch["input_ids"].shape for batch in found.batches]
    assert found.to("cpu").fingerprint == found.fingerprint
    assert torch.equal(there.held_out, found.held_out)
