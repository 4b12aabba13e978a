"""Tiny models of every family, made from a seed; nothing is downloaded."""

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads on two busy cores wait for each other at every small product: one is faster, and nobody must spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import hypothesis
import pytest
import torch
import transformers
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf_compact import verify
from hf_compact.calibration import builtin_text
from hf_compact.hf import card
from tests.fake_hub import WRITER, serve
from tests.forked import Verifications

torch.set_num_threads(1)
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")
transformers.utils.logging.disable_progress_bar()

_PLOT = card.plot_layers
VOCABULARY = 384
SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4, "vocab_size": VOCABULARY}
NO_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

#: family -> (config class, model class, settings)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", "MistralForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 256}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"num_hidden_layers": 3, "hidden_size": 32, "ffn_dim": 72, "num_attention_heads": 4, "vocab_size": VOCABULARY,
         "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    ),
    "bert": ("BertConfig", "BertModel", SMALL),
    "bert_mlm": ("BertConfig", "BertForMaskedLM", SMALL),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"num_layers": 2, "num_decoder_layers": 2, "d_model": 32, "d_ff": 72, "num_heads": 4, "d_kv": 8, "vocab_size": VOCABULARY,
         "decoder_start_token_id": 0},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}),
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **overrides) -> transformers.PreTrainedModel:
    """A random model whose weights have a usual spread."""
    config_class, model_class, settings = FAMILIES[family]
    settings = settings | overrides
    if family != "vit":
        settings = NO_SPECIAL | settings
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)._from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tiny_inputs(family: str, batch: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, : length // 2]}
    return {"input_ids": ids}


def train_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")[:50_000]], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=10_000_000
    )


@pytest.fixture(scope="session", autouse=True)
def without_what_takes_seconds() -> Iterator[None]:
    """Verifications are forks of a process that has done the imports, and no report is plotted."""
    verifications = Verifications()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", verifications)
        patch.setattr(card, "plot_layers", lambda report, path: path.write_bytes(b"a picture"))
        yield
    verifications.end()


@contextlib.contextmanager
def as_users_run_it() -> Iterator[None]:
    """For the runs that have both: a fresh interpreter and a plot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", subprocess)
        patch.setattr(card, "plot_layers", _PLOT)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(builtin_text("calibration")[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory, tokenizer) -> Path:
    """A tied tiny Llama with its tokenizer, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The fake Hub, as the endpoint of this process, with a token that may write below `me`."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
