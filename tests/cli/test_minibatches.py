"""The three sampling schemes."""

from __future__ import annotations

import itertools

import pytest
import torch

from thermograd.errors import HyperparameterError, StoreError
from thermograd.hyperparameters import Sampling
from thermograd.minibatches import Minibatches


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def draw(batches: Minibatches, count: int) -> list[list[int]]:
    return [b.tolist() for b in itertools.islice(batches, count)]


def test_reshuffle_visits_every_sample_once_an_epoch_in_a_new_order() -> None:
    batches = Minibatches(20, 5, "reshuffle", seed=0)
    epochs = [flat(draw(batches, 4)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_shuffle_once_repeats_its_order() -> None:
    batches = Minibatches(20, 5, "shuffle-once", seed=0)
    first, second = draw(batches, 4), draw(batches, 4)
    assert first == second
    assert sorted(flat(first)) == list(range(20))
    assert flat(first) != list(range(20))


def test_replacement_draws_independently() -> None:
    n, b, steps = 10, 4, 20000
    drawn = torch.tensor(draw(Minibatches(n, b, "replacement", seed=0), steps))
    counts = torch.bincount(drawn.flatten(), minlength=n).double()
    mean = steps * b / n
    chi2 = float(((counts - mean) ** 2 / mean).sum())
    assert chi2 < 33.7  # chi-squared with 9 degrees of freedom: exceeded once in 10 000 seeds
    doubles = float((drawn[:, 0] == drawn[:, 1]).double().mean())
    assert abs(doubles - 1 / n) < 4 * (0.1 * 0.9 / steps) ** 0.5  # false alarm once in 16 000 seeds


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2] * 2), (True, [4, 4] * 3)])
def test_a_batch_size_that_does_not_divide(drop_last: bool, sizes: list[int]) -> None:
    batches = Minibatches(10, 4, "reshuffle", drop_last=drop_last)
    assert [len(b) for b in draw(batches, 6)] == sizes


@pytest.mark.parametrize("sampling", ["replacement", "reshuffle", "shuffle-once"])
@pytest.mark.parametrize("before", [0, 3, 5, 7])
def test_state_goes_on_with_the_same_batches(sampling: Sampling, before: int) -> None:
    batches = Minibatches(10, 2, sampling, seed=4)
    draw(batches, before)
    state = batches.state_dict()
    expected = draw(batches, 12)
    again = Minibatches(10, 2, sampling, seed=99)
    again.load_state_dict(state)
    assert draw(again, 12) == expected


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert draw(Minibatches(50, 5, seed=1), 3) != draw(Minibatches(50, 5, seed=2), 3)
    assert draw(Minibatches(50, 5, seed=1), 3) == draw(Minibatches(50, 5, seed=1), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(HyperparameterError, match="larger than dataset_size"):
        Minibatches(4, 5)
    assert len(next(Minibatches(4, 5, "replacement"))) == 5
    with pytest.raises(HyperparameterError, match="batch_size is 0"):
        Minibatches(4, 0)
    batches, other = Minibatches(4, 2), Minibatches(6, 2)
    next(batches)
    with pytest.raises(StoreError, match="4 samples"):
        other.load_state_dict(batches.state_dict())
