import itertools
import random

import pytest

from hf_compact.budget import Choice, allocate, allocate_exact
from hf_compact.errors import ConfigError


def random_layers(seed: int, num_layers: int = 6, num_choices: int = 4) -> list[list[Choice]]:
    generator = random.Random(seed)
    return [[Choice(generator.randint(1, 40), generator.uniform(0, 10)) for _ in range(num_choices)] for _ in range(num_layers)]


def totals(layers, table):
    chosen = [choices[i] for choices, i in zip(layers, table, strict=True)]
    return sum(c.num_bytes for c in chosen), sum(c.error for c in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_exact_is_what_brute_force_finds(seed):
    layers = random_layers(seed)
    budget = 90
    feasible = [totals(layers, table) for table in itertools.product(range(4), repeat=6)]
    best = min(error for used, error in feasible if used <= budget)
    used, error = totals(layers, allocate_exact(layers, budget))
    assert used <= budget
    assert error == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_price_is_optimal_for_the_bytes_it_uses(seed):
    layers = random_layers(seed)
    used, error = totals(layers, allocate(layers, 90))
    assert used <= 90
    assert error == pytest.approx(totals(layers, allocate_exact(layers, used))[1])


def test_price_comes_close_on_many_layers():
    layers = random_layers(0, num_layers=300)
    smallest = sum(min(c.num_bytes for c in choices) for choices in layers)
    budget = smallest * 2
    used, _ = totals(layers, allocate(layers, budget))
    assert budget - 40 <= used <= budget


def test_a_large_budget_takes_the_least_error():
    layers = random_layers(1)
    least = sum(min(c.error for c in choices) for choices in layers)
    assert totals(layers, allocate(layers, 10_000))[1] == pytest.approx(least)
    assert totals(layers, allocate_exact(layers, 10_000))[1] == pytest.approx(least)


@pytest.mark.parametrize("solve", [allocate, allocate_exact], ids=["price", "exact"])
def test_an_impossible_budget_is_named(solve):
    with pytest.raises(ConfigError, match=r"budget must be at least 7 bytes for these choices, got 6"):
        solve([[Choice(3, 0.0)], [Choice(4, 0.0), Choice(9, 0.0)]], 6)


@pytest.mark.parametrize("solve", [allocate, allocate_exact], ids=["price", "exact"])
def test_a_tight_budget_takes_the_smallest(solve):
    layers = random_layers(2)
    least = sum(min(c.num_bytes for c in choices) for choices in layers)
    assert totals(layers, solve(layers, least))[0] == least
