"""Hyperparameters: ranges, and what is derived from them."""

import dataclasses
import math

import pytest
import torch

import thermograd as tg
from thermograd.errors import HyperparameterError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("momentum", 1.0), ("momentum", -0.1),
        ("weight_decay", -1e-9), ("weight_decay", math.nan), ("dampening", 1.0), ("batch_size", 0),
        ("batch_size", 2.5), ("batch_size", -3), ("batch_size", math.nan), ("dataset_size", 0),
        ("sampling", "sorted"), ("nesterov", True),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(HyperparameterError, match=name):
        tg.SGD(**{"lr": 0.1, name: value})


def test_a_batch_larger_than_the_data_set_needs_replacement():
    with pytest.raises(HyperparameterError, match="batch_size 20"):
        tg.SGD(lr=0.1, batch_size=20, dataset_size=10)
    assert tg.SGD(lr=0.1, batch_size=20, dataset_size=10, sampling="replacement").minibatch_factor == 1 / 20


def test_minibatch_factor_is_the_exact_variance_ratio_of_a_finite_population():
    values = torch.tensor([1.0, -2.0, 4.0, 0.5, 3.0], dtype=torch.float64)
    pairs = torch.combinations(torch.arange(5), 2)
    means = values[pairs].mean(1)
    exact = means.var(correction=0) / values.var(correction=0)
    assert tg.SGD(lr=0.1, batch_size=2, dataset_size=5).minibatch_factor == pytest.approx(float(exact))


def test_missing_sizes_are_named():
    with pytest.raises(HyperparameterError, match="batch_size is not set"):
        _ = tg.SGD(lr=0.1).minibatch_factor
    with pytest.raises(HyperparameterError, match="dataset_size is not set"):
        _ = tg.SGD(lr=0.1, batch_size=3).steps_per_epoch


def test_from_optimizer_reads_torch_and_refuses_the_rest():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, lr=0.2, momentum=0.8, weight_decay=0.01, nesterov=True)
    sgd = tg.SGD.from_optimizer(optimizer, batch_size=4, dataset_size=40)
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov) == (0.2, 0.8, 0.01, True)
    assert tg.SGD.from_dict(sgd.to_dict()) == sgd
    with pytest.raises(HyperparameterError, match="Adam"):
        tg.SGD.from_optimizer(torch.optim.Adam(weights))
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2}]
    with pytest.raises(HyperparameterError, match="different"):
        tg.SGD.from_optimizer(torch.optim.SGD(groups))
    with pytest.raises(HyperparameterError, match="maximises"):
        tg.SGD.from_optimizer(torch.optim.SGD(weights, lr=0.1, maximize=True))


def test_it_is_immutable():
    sgd = tg.SGD(lr=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sgd.lr = 0.2
    assert sgd.replace(lr=0.2).lr == 0.2
