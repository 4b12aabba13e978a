"""The programmes against brute force, against each other, and at the size of a real model."""

import itertools
import random
import time

import pytest

from hf_compact import budget
from hf_compact.budget import Choice, allocate, allocate_within, front, totals
from hf_compact.errors import ConfigError


def random_layers(seed: int, num_layers: int = 5, num_choices: int = 4, most_bytes: int = 40) -> list[list[Choice]]:
    generator = random.Random(seed)
    return [
        [Choice(generator.randint(1, most_bytes), generator.uniform(0, 10)) for _ in range(num_choices)]
        for _ in range(num_layers)
    ]


def every_total(layers) -> list[Choice]:
    return [totals(layers, table) for table in itertools.product(*(range(len(choices)) for choices in layers))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_least_error_is_what_brute_force_finds(seed, share):
    layers = random_layers(seed)
    found = every_total(layers)
    least, most = min(t.num_bytes for t in found), max(t.num_bytes for t in found)
    limit = int(least + share * (most - least))
    used = totals(layers, allocate(layers, limit))
    assert used.num_bytes <= limit
    assert used.error == pytest.approx(min(t.error for t in found if t.num_bytes <= limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_rounding_to_buckets_costs_no_more_than_the_buckets(seed, share):
    """Megabytes: never above the budget, never worse than brute force with half a bucket per layer and side less."""
    layers = random_layers(seed, most_bytes=40_000_000)
    found = every_total(layers)
    least, most = min(t.num_bytes for t in found), max(t.num_bytes for t in found)
    limit = int(least + share * (most - least))
    slack = 2 * len(layers) * (limit - least) / 20_000
    used = totals(layers, allocate(layers, limit))
    assert used.num_bytes <= limit
    assert used.error <= min(t.error for t in found if t.num_bytes <= max(least, limit - slack)) + 1e-12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_least_bytes_is_what_brute_force_finds(seed, share):
    layers = random_layers(seed)
    found = every_total(layers)
    least, most = min(t.error for t in found), max(t.error for t in found)
    limit = least + share * (most - least)
    slack = 2 * len(layers) * (limit - least) / 20_000
    used = totals(layers, allocate_within(layers, limit))
    assert used.error <= limit
    assert used.num_bytes <= min(t.num_bytes for t in found if t.error <= max(least, limit - slack))


@pytest.mark.parametrize("seed", range(8))
def test_the_front_is_optimal_for_the_bytes_it_uses(seed):
    layers = random_layers(seed)
    found = every_total(layers)
    points = [totals(layers, table) for table in front(layers)]
    assert len(points) >= 3
    for point in points:
        assert point.error == pytest.approx(min(t.error for t in found if t.num_bytes <= point.num_bytes))
    assert points[0].num_bytes == min(t.num_bytes for t in found)
    assert points[-1].error == pytest.approx(min(t.error for t in found))
    slopes = [(b.error - a.error) / (b.num_bytes - a.num_bytes) for a, b in itertools.pairwise(points)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == pytest.approx(sorted(slopes))


def test_a_real_model_takes_less_than_a_second_and_uses_its_budget():
    """210 Linears, 8 choices; sizes like those of codes: the rounding of so many layers leaves next to nothing unused."""
    generator = random.Random(0)
    layers = []
    for _ in range(210):
        weights, worth = generator.choice([331_776, 110_592, 884_736]), generator.lognormvariate(0, 1)
        bits = [2.2, 2.7, 3.2, 3.4, 4.2, 4.4, 6.2, 8.2]
        layers.append([Choice(int(weights * b / 8) + generator.randint(0, 99), worth * 4**-b) for b in bits])
    limit = int(sum(choices[0].num_bytes for choices in layers) * 1.4)
    started = time.process_time()
    used = totals(layers, allocate(layers, limit))
    assert time.process_time() - started < 1.0
    assert 0.9995 * limit <= used.num_bytes <= limit
    by_price = [t for t in (totals(layers, table) for table in front(layers)) if t.num_bytes <= limit][-1]
    assert used.error <= by_price.error
    dual = totals(layers, allocate_within(layers, used.error))
    assert dual.error <= used.error
    assert dual.num_bytes == pytest.approx(used.num_bytes, rel=1e-3)


def test_beyond_the_programme_the_price_comes_close():
    layers = random_layers(0, num_layers=budget._MOST_LAYERS + 1, most_bytes=9000)
    limit = 2 * sum(min(c.num_bytes for c in choices) for choices in layers)
    table = allocate(layers, limit)
    assert limit - 9000 <= totals(layers, table).num_bytes <= limit
    assert table in front(layers)


def test_a_large_budget_takes_the_least_error():
    layers = random_layers(1)
    least = sum(min(c.error for c in choices) for choices in layers)
    assert totals(layers, allocate(layers, 10_000)).error == pytest.approx(least)
    assert totals(layers, allocate_within(layers, 1e9)).num_bytes == sum(min(c.num_bytes for c in choices) for choices in layers)


def test_what_cannot_be_met_is_named():
    layers = [[Choice(3, 0.5)], [Choice(4, 0.25), Choice(9, 0.0)]]
    with pytest.raises(ConfigError, match=r"budget must be at least 7 bytes for these choices, got 6"):
        allocate(layers, 6)
    with pytest.raises(ConfigError, match=r"max_error must be at least 0.5 for these choices, got 0.4"):
        allocate_within(layers, 0.4)


def test_no_room_takes_the_smallest():
    layers = [[Choice(3, 0.5), Choice(3, 0.1)], [Choice(9, 0.0), Choice(4, 0.25)]]
    assert allocate(layers, 7) == [1, 1]
    assert allocate_within(layers, 0.1) == [1, 0]
