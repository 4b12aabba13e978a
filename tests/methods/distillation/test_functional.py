"""Laws of the terms, against torch's own distributions."""

import itertools

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hf_compact.functional import divergence
from hf_compact.methods.distillation.functional import (
    balanced_kl,
    entropy,
    gather_log_probs,
    relation_divergence,
    top_log_probs,
    with_tail,
)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_and_entropy_are_those_of_torch():
    p, q = logits(0, 3, 4, 9), logits(1, 3, 4, 9)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(divergence.kl_divergence(log_p, log_q), expected)
    torch.testing.assert_close(entropy(log_p), Categorical(logits=p).entropy())


def test_all_outcomes_kept_is_the_whole_divergence():
    p, q = logits(0, 5, 9), logits(1, 5, 9)
    ids, log_probs, tail = top_log_probs(p, 9, temperature=2.0)
    found = divergence.kl_divergence(with_tail(log_probs, tail), gather_log_probs(q, ids, 2.0))
    expected = kl_divergence(Categorical(logits=p / 2), Categorical(logits=q / 2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_fewer_outcomes_are_a_lower_bound_that_rises():
    p, q = logits(0, 50, 30), logits(1, 50, 30)
    found = []
    for count in (1, 4, 10, 20, 29):
        ids, log_probs, tail = top_log_probs(p, count)
        found.append(divergence.kl_divergence(with_tail(log_probs, tail), gather_log_probs(q, ids)))
    assert all((a <= b + 1e-5).all() for a, b in itertools.pairwise(found))
    assert (found[-1] <= kl_divergence(Categorical(logits=p), Categorical(logits=q)) + 1e-5).all()


@pytest.mark.parametrize("balance", ["hard", "sigmoid"])
def test_the_balance_favours_the_forward_direction_for_a_sure_student(balance):
    sure, unsure = torch.tensor([[5.0, 0.0, 0.0]]).log_softmax(-1), torch.tensor([[0.5, 0.0, 0.1]]).log_softmax(-1)
    forward, reverse = divergence.kl_divergence(unsure, sure), divergence.kl_divergence(sure, unsure)
    found = balanced_kl(unsure, sure, balance, weight=3.0, slope=50.0)
    torch.testing.assert_close(found, 3 * forward + reverse if balance == "hard" else forward)
    forward, reverse = reverse, forward  # the roles are changed: the student is the unsure one
    found = balanced_kl(sure, unsure, balance, weight=3.0, slope=50.0)
    torch.testing.assert_close(found, forward + 3 * reverse if balance == "hard" else reverse)
    assert balanced_kl(sure, sure, balance).abs().max() < 1e-6


def test_relations_do_not_see_rotations_padding_or_width():
    x = logits(0, 2, 5, 8)
    rotation = torch.linalg.qr(logits(1, 8, 8)).Q
    assert relation_divergence(x @ rotation, x, 1).abs().max() < 1e-4
    assert relation_divergence(x @ rotation, x, 2).abs().max() > 1e-3
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    other = x.clone()
    other[:, 3:] = 7.0
    assert relation_divergence(other, x, 2, mask)[:, :3].abs().max() < 1e-5
    assert relation_divergence(logits(2, 2, 5, 4), x, 4).shape == (2, 5)
    with pytest.raises(ValueError, match="relation_heads must divide the width 8, got 3"):
        relation_divergence(x, x, 3)


def test_lost_energy_of_known_vectors():
    target = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert divergence.lost_energy(torch.zeros(2, 2), target).tolist() == [1.0, 1.0]
    assert divergence.lost_energy(target, target).tolist() == [0.0, 0.0]
