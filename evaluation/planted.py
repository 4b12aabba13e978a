"""A tiny model with planted channels that score low and cannot be spared: what CRIC is for.

    python -m evaluation.pruning ... --step cric

Two channels read a loud dimension of the residual stream and write one that the head hears well, by small weights: what they do
is one fact each, which token follows another. HESSO's scores see small weights; CRIC tries what would go before it goes.
"""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_compact import HessoCallback

#: (layer, channel, token it answers to, token that must follow, residual dimension it reads, that it writes)
PLANTED = ((0, 7, 300, 310, 28, 29), (2, 50, 301, 311, 30, 31))
#: HESSO's own scores, without what a group adds to the output.
PAPER = {"output": 0.0} | dict.fromkeys(("magnitude", "avg_magnitude", "cosine", "taylor_first", "taylor_second"), 0.2)
#: By which a fifth of the channels goes.
SETTINGS = PAPER | {
    "target": 0.2, "unit": "groups", "kinds": ("channels",), "channel_multiple": 1, "warm_up_steps": 1, "pruning_steps": 4,
    "periods": 1, "cric_cycles": 3, "cric_steps": 4,
}  # fmt: skip
SEEDS = (0, 1, 2)
#: Cross-entropy behind a planted token, in nats, below which its channel has survived, and above which it has not: the trained
#: model has less than 0.001, a guess 6.
SURVIVED, DIED = 0.05, 1.0


def rows(number: int = 24, seed: int = 0) -> Tensor:
    """Words that follow each other by rule, and after some the planted tokens and what must follow them; `[number, 24]`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 200, (number, 4), generator=generator)
    parts = [words, (words * 7) % 197 + 3]
    for _, _, token, answer, _, _ in PLANTED:
        parts += [torch.full((number, 4), token), torch.full((number, 4), answer)]
    return torch.stack(parts, 2).flatten(1)


@torch.no_grad()
def plant_(model: LlamaForCausalLM) -> None:
    """Make the channels; their task is solved beyond doubt then."""
    for layer, channel, token, answer, reads, writes in PLANTED:
        model.model.embed_tokens.weight[:, [reads, writes]] = 0
        model.model.embed_tokens.weight[:, reads] = -3.0
        model.model.embed_tokens.weight[token, reads] = 3.0
        model.lm_head.weight[:, [reads, writes]] = 0
        model.lm_head.weight[answer, writes] = 30.0
        for number, block in enumerate(model.model.layers):
            attention, mlp = block.self_attn, block.mlp
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight[[reads, writes]] = 0
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, [reads, writes]] = 0
            if number == layer:
                block.post_attention_layernorm.weight[reads] = 20.0
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[channel] = mlp.up_proj.weight[channel] = 0
        mlp.down_proj.weight[:, channel] = 0
        mlp.gate_proj.weight[channel, reads] = mlp.up_proj.weight[channel, reads] = 0.2
        mlp.down_proj.weight[writes, channel] = 0.2


def model(seed: int = 0) -> LlamaForCausalLM:
    """Three blocks of 72 channels, planted and trained for 30 steps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    plant_(made)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-4)
    for step in range(30):
        ids = rows(8, seed=1000 * seed + step)
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


@torch.no_grad()
def errors(model: LlamaForCausalLM) -> list[float]:
    """Cross-entropy behind each of the planted tokens, in nats."""
    ids = rows(seed=100)
    logits = model.eval()(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [float(losses[ids[:, :-1] == token].mean()) for _, _, token, *_ in PLANTED]


def train(model: LlamaForCausalLM, callback: HessoCallback, folder: str, resume: str | None = None, **settings: Any) -> None:
    """In a stock Trainer, until the last group is gone."""
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, learning_rate=3e-4, max_steps=callback.config.last_step, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=3, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows()]
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)


def survivors() -> dict[str, list[list[float]]]:
    """Errors by seed of the trained model, of it pruned without CRIC, and pruned with it."""
    found: dict[str, list[list[float]]] = {"trained": [], "without": [], "with": []}
    for seed in SEEDS:
        trained = model(seed)
        found["trained"].append(errors(trained))
        for name, cric in (("without", False), ("with", True)):
            pruned = copy.deepcopy(trained)
            with tempfile.TemporaryDirectory() as folder:
                train(pruned, HessoCallback(**SETTINGS | {"cric": cric}), folder, save_strategy="no")
            found[name].append(errors(pruned))
    return found
