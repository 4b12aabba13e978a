"""Whole experts: cutting them equals a router that never picks them, and what is left is an ordinary model."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers

from hf_compact import drop_experts_
from hf_compact.errors import ConfigError, NothingMatched, NumericalError, UnsupportedModel
from hf_compact.methods.pruning.experts import FAMILIES, _scores, find_experts
from tests.conftest import tiny_model
from tests.methods.pruning.test_apply import STOCK

CLASSES = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def mixture(family: str, **settings):
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12} if family.startswith("qwen") else {}
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_experts_per_tok=2, eos_token_id=1, pad_token_id=2, **{FAMILIES[family]: 8} | sizes | settings,
    )  # fmt: skip
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def never_picked(model, gone: dict[str, list[int]], monkeypatch) -> torch.Tensor:
    """Logits of a model whose routers give some experts no probability at all."""
    softmax, block = torch.nn.functional.softmax, ""

    def masked(logits, *args, **kwargs):
        if block and logits.dim() == 2:
            logits = logits.clone()
            logits[:, gone[block]] = -torch.inf
        return softmax(logits, *args, **kwargs)

    def enter(name):
        nonlocal block
        block = name

    for name in gone:
        gate = model.get_submodule(name).gate
        gate.register_forward_pre_hook(lambda *_, name=name: enter(name))
        gate.register_forward_hook(lambda *_: enter(""))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", masked)
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("score", ["output", "frequency"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cutting_equals_a_router_that_never_picks_them(family, score, tmp_path, monkeypatch):
    model = mixture(family)
    whole = copy.deepcopy(model)
    gone = drop_experts_(model, BATCHES, share=0.4, score=score)
    assert [len(numbers) for numbers in gone.values()] == [3, 3]
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert (logits - whole(input_ids=IDS).logits).abs().max() > 1e-3
        torch.testing.assert_close(logits, never_picked(whole, gone, monkeypatch), rtol=0, atol=1e-5)
        assert model(input_ids=IDS, labels=IDS, output_router_logits=True).aux_loss.isfinite()
    said = [
        model.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=use_cache, attention_mask=torch.ones(1, 16))
        for use_cache in (True, False)
    ]
    assert said[0].tolist() == said[1].tolist()

    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded.config, FAMILIES[family]) == 5
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, logits)


def test_it_loads_where_this_library_is_not(tmp_path):
    model = mixture("qwen3_moe")
    drop_experts_(model, BATCHES)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 15)[None]).logits.double().sum().item()
    done = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def by_hand(model, block: int, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of router weight times length of the output, token by token, and how many tokens each expert gets."""
    experts, seen = model.model.layers[block].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(input_ids=IDS, attention_mask=mask)
    handle.remove()
    sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for state, chosen, weights, is_real in zip(*seen[0], mask.flatten(), strict=True):
        for expert, weight in zip(chosen.tolist(), weights, strict=True) if is_real else ():
            gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
            sums[expert] += float(weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)).norm())
            counts[expert] += 1
    return sums / counts.clamp_min(1), counts


@pytest.mark.parametrize("score", ["output", "frequency"])
def test_scores_are_those_of_tokens_that_count(score):
    """Router weights and padding make a difference to which experts go."""
    model = mixture("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data *= torch.linspace(1, 1.6, 8)[:, None, None]
    mask = torch.ones_like(IDS)
    mask[1, 2:] = 0
    found = _scores(model, find_experts(model), [{"input_ids": IDS, "attention_mask": mask}], score)["model.layers.0.mlp"]
    expected = by_hand(model, 0, mask)[score == "frequency"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, by_hand(model, 0, torch.ones_like(mask))[score == "frequency"], rtol=0.02)
    gone = drop_experts_(model, [{"input_ids": IDS, "attention_mask": mask}], share=0.5, score=score)["model.layers.0.mlp"]
    assert gone == sorted(expected.argsort(descending=True, stable=True)[4:].tolist())


def test_modes_of_modules_stay():
    model = mixture("mixtral").train()
    model.model.layers[0].eval()
    drop_experts_(model, BATCHES)
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, False, True)


def test_blocks_without_experts_stay():
    model = mixture("qwen3_moe", mlp_only_layers=[0])
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    assert list(drop_experts_(model, BATCHES)) == ["model.layers.1.mlp"]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, r"share must be in \[0, 1\), got 1\.0"),
        ({"share": 0.1}, r"share 0\.1 of 8 experts rounds to none"),
        ({"share": 0.9}, r"share must leave the 2 experts that every token is sent to, got 0\.9 of 8"),
        ({"score": "size"}, r"score must be one of output, frequency, got 'size'"),
        ({"batches": []}, r"batches must hold at least one batch, got none"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    model = mixture("mixtral")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        drop_experts_(**{"model": model, "batches": BATCHES} | settings)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match=r"experts are dropped in mixtral, olmoe, qwen2_moe, qwen3_moe only, got llama"):
        drop_experts_(tiny_model("llama"), BATCHES)
    with pytest.raises(NothingMatched, match="no block of this qwen3_moe model has a router"):
        drop_experts_(mixture("qwen3_moe", mlp_only_layers=[0, 1]), BATCHES)
    broken = mixture("mixtral")
    broken.model.layers[1].mlp.experts.down_proj.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp gives outputs that are not finite"):
        drop_experts_(broken, BATCHES)
