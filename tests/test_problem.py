"""The problem: pure functions of the weights against plain torch, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import thermograd as tg
from thermograd.errors import (
    DataError,
    InputError,
    LossError,
    ModelError,
    NonFiniteError,
    NotAvailableError,
    OutputMismatchError,
    ThermogradError,
)


def classes(n=12, c=3, seed=0):
    return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))


def images(n=12):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 3)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.again(torch.tanh(self.encode(x)))))


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(12, 3)).eval()


def networks():
    torch.manual_seed(3)
    conv = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
    norm = [nn.Conv2d(2, 4, 3, groups=2, dilation=2), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Dropout()]
    rows = torch.randn(12, 4)
    return {
        "mlp": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), rows),
        "cnn": (nn.Sequential(*conv, nn.Linear(16, 3)), images()),
        "batch norm in eval mode": (nn.Sequential(*norm, nn.Linear(16, 3)).eval(), images()),
        "embedding": (nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)), torch.randint(0, 7, (12, 3))),
        "transformer": (encoder(), torch.randn(12, 3, 4)),
        "tied": (Tied(), rows),
        "recurrent": (LastStep(), torch.randn(12, 5, 4)),
    }


@pytest.mark.parametrize("name", networks())
def test_loss_and_gradients_agree_with_plain_torch(name):
    model, X = networks()[name]
    y = classes()
    problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, y))
    plain = model.double()
    X = X.double() if X.is_floating_point() else X
    losses = F.cross_entropy(plain(X), y, reduction="none")
    rows = [torch.autograd.grad(one, list(plain.parameters()), retain_graph=True) for one in losses]
    expected = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert torch.allclose(problem.sample_losses(), losses, rtol=1e-10)
    assert torch.allclose(problem.sample_gradients(), expected, rtol=1e-8, atol=1e-12)
    assert torch.allclose(problem.gradient(), expected.mean(0), rtol=1e-8, atol=1e-12)
    assert float(problem.loss()) == pytest.approx(float(losses.detach().mean()), rel=1e-12)
    assert expected.shape[1] == problem.P


def test_second_derivatives_exist_for_attention():
    model, X = networks()["transformer"]
    problem = tg.Problem(model, nn.CrossEntropyLoss(), (X, classes()))
    leaf = problem.theta.requires_grad_()
    (first,) = torch.autograd.grad(problem.differentiable_sample_losses(leaf, None).mean(), leaf, create_graph=True)
    vector = torch.randn(problem.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (product,) = torch.autograd.grad(first, leaf, vector)
    step = 1e-5
    at = problem.theta
    numeric = (problem.gradient(at + step * vector) - problem.gradient(at - step * vector)) / (2 * step)
    assert torch.allclose(product, numeric, rtol=1e-4, atol=1e-7)


weights = torch.tensor([0.2, 1.0, 3.0])
CRITERIA = {
    "mse": (nn.MSELoss(), "real"),
    "huber": (nn.HuberLoss(delta=0.3), "real"),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=weights), "bits"),
    "cross-entropy": (nn.CrossEntropyLoss(), "label"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), "label"),
    "weighted": (nn.CrossEntropyLoss(weight=weights), "label"),
    "weighted and smoothed": (nn.CrossEntropyLoss(weight=weights, label_smoothing=0.2), "label"),
    "probabilities": (nn.CrossEntropyLoss(weight=weights), "probability"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_mean_of_the_sample_losses_is_torchs_loss(name):
    criterion, kind = CRITERIA[name]
    torch.manual_seed(0)
    model, X = nn.Linear(4, 3).double(), torch.randn(12, 4).double()
    y = {
        "real": torch.randn(12, 3).double(), "bits": torch.randint(0, 2, (12, 3)), "label": classes(),
        "probability": torch.rand(12, 3).double().softmax(1),
    }[kind]  # fmt: skip
    problem = tg.Problem(model, criterion, (X, y))
    expected = criterion.double()(model(X), y.double() if kind == "bits" else y)
    assert float(problem.loss()) == pytest.approx(expected.item(), rel=1e-12)
    assert criterion.reduction == "mean"  # the user's own loss is left as it was
    assert float(problem.sample_losses().mean()) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        lambda o, t: (o - t).square().mean(),
        lambda o, t: (o - t).square().flatten(1).mean(1),  # one loss a sample
        lambda o, t: (o - t).square().sum() / 2,  # for a single sample: two outputs
    ],
)
def test_callables_for_a_sample_or_a_batch_give_the_same_losses(loss):
    torch.manual_seed(0)
    model, X, y = nn.Linear(4, 2).double(), torch.randn(9, 4).double(), torch.randn(9, 2).double()
    problem = tg.Problem(model, loss, (X, y))
    assert torch.allclose(problem.sample_losses(), (model(X) - y).square().mean(1))


def test_weights_subset_frozen_parts_and_live_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    X, y = torch.randn(12, 4), classes()
    layer = tg.Problem(model, nn.CrossEntropyLoss(), (X, y), params="0")
    assert layer.names == ["0.weight", "0.bias"]
    assert tg.Problem(model, nn.CrossEntropyLoss(), (X, y), params="*.weight").P == 35
    whole = tg.Problem(model, nn.CrossEntropyLoss(), (X, y))
    assert torch.allclose(whole.gradient()[: layer.P], layer.gradient())
    model[2].requires_grad_(False)
    assert tg.Problem(model, nn.CrossEntropyLoss(), (X, y)).names == ["0.weight", "0.bias"]
    before = float(layer.loss())
    with torch.no_grad():
        model[2].weight.mul_(2)  # not part of theta, but of the function
        model[0].weight.add_(0.1)
    assert float(layer.loss()) != before
    assert float(layer.loss()) == pytest.approx(float(F.cross_entropy(model(X), y)), rel=1e-5)
    whole.set_weights(torch.zeros(whole.P))
    assert float(model[0].weight.abs().sum()) == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_chunks_never_change_the_numbers(chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2)
    data = torch.randn(11, 3, generator=generator), torch.randn(11, 2, generator=generator)
    whole, parts = (tg.Problem(model, nn.MSELoss(), data, chunk_size=c) for c in (None, chunk))
    theta = torch.randn(8, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 11, (7,), generator=generator)
    assert torch.allclose(whole.gradient(theta), parts.gradient(theta))
    assert torch.allclose(whole.sample_gradients(theta, index), parts.sample_gradients(theta, index))
    assert torch.allclose(whole.minibatch_loss(theta, index), parts.sample_losses(theta, index).mean())
    assert torch.equal(torch.cat(list(parts.chunks())), torch.arange(11))
    assert torch.allclose(whole.flatten(whole.unflatten(theta)), theta)


def test_theta_may_be_numpy_and_is_checked():
    problem = tg.Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.randn(5, 2), torch.randn(5, 1)))
    assert torch.allclose(problem.loss(np.ones(3)), problem.loss(torch.ones(3)))
    with pytest.raises(InputError, match=r"shape \(4,\)"):
        problem.loss(np.ones(4))
    with pytest.raises(NonFiniteError, match="theta\\[1\\]"):
        problem.gradient(np.array([0.0, np.nan, 0.0]))
    for index in ([5], [-6], [], [0.5], np.zeros((2, 2), int)):
        with pytest.raises(DataError):
            problem.loss(None, index)


def test_from_function_follows_the_tensor_that_an_optimizer_moves():
    centres = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    problem = tg.Problem.from_function(lambda w, a, s: s * (w - a).square().sum() / 2, theta, (centres, scale))
    assert torch.allclose(problem.sample_gradients(), -scale[:, None] * centres)
    with torch.no_grad():
        theta += 1
    assert torch.allclose(problem.theta, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(problem.gradient(), (scale[:, None] * (1 - centres)).mean(0))
    with pytest.raises(NotAvailableError, match="no network output"):
        problem.differentiable_outputs(problem.theta, None)
    with pytest.raises(LossError, match="scalar"):
        tg.Problem.from_function(lambda w, a: w - a, torch.zeros(3), centres)
    looped = tg.Problem.from_function(lambda w, a: (w - float(a[0])).square().sum(), torch.zeros(3), centres)
    assert looped.sample_gradients().shape == (6, 3)


def test_data_loaders_tell_their_batches_and_keep_the_data_sets_order():
    X, y = torch.arange(20.0).reshape(10, 2), torch.arange(10.0)[:, None]
    for loader, sampling in [
        (DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True), "reshuffle"),
        (DataLoader(TensorDataset(X, y), batch_size=3), "shuffle-once"),
        (DataLoader(TensorDataset(X, y), 3, sampler=RandomSampler(range(10), replacement=True)), "replacement"),
    ]:
        problem = tg.Problem(nn.Linear(2, 1), nn.MSELoss(), loader)
        assert (problem.batch_size, problem.sampling, problem.N) == (3, sampling, 10)
        assert torch.equal(problem.inputs, X)


class Jittered(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.randn(2), torch.zeros(1)


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.full((2,), float(i)), torch.zeros(1)) for i in range(5))


def test_iterable_data_sets_are_read_once():
    assert tg.Problem(nn.Linear(2, 1), nn.MSELoss(), Stream()).N == 5


def build(model=None, loss=None, X=None, y=None, data=None, **options):
    torch.manual_seed(0)
    X = torch.randn(8, 2) if X is None else X
    y = torch.randn(8, 1) if y is None else y
    model = nn.Linear(2, 1) if model is None else model
    return tg.Problem(model, nn.MSELoss() if loss is None else loss, (X, y) if data is None else data, **options)


def spoiled():
    X = torch.randn(8, 2)
    X[3, 1] = float("nan")
    return X


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


REFUSED = {
    "batch norm in train mode": (ModelError, "eval", lambda: build(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)))),
    "batch norm without statistics": (
        ModelError, "running statistics",
        lambda: build(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, track_running_stats=False)).eval())),
    "samples coupled by hand": (ModelError, "other samples", lambda: build(Centred(2, 1))),
    "dropout on": (ModelError, "Dropout", lambda: build(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)))),
    "loss summed": (LossError, "mean", lambda: build(loss=nn.MSELoss(reduction="sum"))),
    "loss not reduced": (LossError, "mean", lambda: build(loss=nn.MSELoss(reduction="none"))),
    "function that sums": (LossError, "sum", lambda: build(loss=lambda o, t: F.mse_loss(o, t, reduction="sum"))),
    "loss not callable": (LossError, "callable", lambda: build(loss="mse")),
    "loss over the batch": (LossError, "mean over samples", lambda: build(loss=lambda o, t: (o - t).var(correction=0))),
    "NaN in the inputs": (DataError, "sample 3", lambda: build(X=spoiled())),
    "NaN in the targets": (DataError, "target", lambda: build(y=torch.full((8, 1), float("nan")))),
    "infinite input": (DataError, "first is sample 0", lambda: build(X=torch.full((8, 2), float("inf")))),
    "no data": (DataError, "empty", lambda: build(X=torch.zeros(0, 2), y=torch.zeros(0, 1))),
    "empty data set": (DataError, "empty", lambda: build(data=TensorDataset(torch.zeros(0, 2), torch.zeros(0, 1)))),
    "unequal lengths": (DataError, "7 and 8 rows", lambda: build(y=torch.randn(7, 1))),
    "data of a wrong kind": (DataError, "pair", lambda: build(data=3)),
    "augmented data": (DataError, "repeatable", lambda: build(data=Jittered())),
    "label too large": (
        DataError, "sample 4", lambda: build(nn.Linear(2, 4), nn.CrossEntropyLoss(), y=torch.arange(8))),
    "label negative": (
        DataError, "0 to 3", lambda: build(nn.Linear(2, 4), nn.CrossEntropyLoss(), y=-torch.ones(8).long())),
    "target shape": (OutputMismatchError, "same shape", lambda: build(y=torch.randn(8))),
    "target shape, function": (OutputMismatchError, "match", lambda: build(loss=F.mse_loss, y=torch.randn(8))),
    "real labels": (OutputMismatchError, "CrossEntropy", lambda: build(loss=nn.CrossEntropyLoss(), y=torch.randn(8))),
    "input shape": (ModelError, "fails on a batch", lambda: build(X=torch.randn(8, 3))),
    "output is a tuple": (OutputMismatchError, "tuple", lambda: build(nn.LSTM(2, 2))),
    "no weights": (ModelError, "gradient", lambda: build(nn.Linear(2, 1).requires_grad_(False))),
    "no such parameter": (ModelError, "weight, bias", lambda: build(params="head")),
    "not a model": (ModelError, "from_function", lambda: build(F.relu)),
    "half precision": (InputError, "float64", lambda: build(dtype=torch.float16)),
    "chunk size": (InputError, "chunk_size", lambda: build(chunk_size=0)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("what", REFUSED)
def test_what_breaks_the_contract_is_refused_at_construction(what):
    kind, text, make = REFUSED[what]
    with pytest.raises(kind, match=text) as caught:
        make()
    assert isinstance(caught.value, ThermogradError)
    assert "Expected:" in str(caught.value)


def test_non_finite_loss_names_the_sample():
    problem = build(loss=nn.MSELoss(), X=torch.tensor([[1.0, 0.0]] * 7 + [[1e150, 0.0]], dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="sample 7"):
        problem.loss(torch.tensor([1e10, 0.0, 0.0]))
