"""What every measurement of the noise does when it is interrupted, short of memory, or given bad samples."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import thermograd as tg
from landscape.networks import make, teacher
from thermograd.errors import DataError, NonFiniteError, ThermogradWarning
from thermograd.noise.perlayer import PerLayer
from thermograd.progress import bar

MEASUREMENTS: dict[str, Callable[[tg.Problem], Any]] = {
    "strength": lambda p: tg.noise.strength(p).value,
    "scale": lambda p: (tg.noise.noise_scale(p).simple, tg.noise.noise_scale(p).curvature_weighted),
    "directions": lambda p: tg.noise.in_directions(p, torch.eye(p.P)[:, :3]).variance,
    "trace": lambda p: tg.noise.covariance(p).trace(),
    "diagonal": lambda p: tg.noise.covariance(p).diagonal(),
    "spectrum": lambda p: tg.noise.covariance_spectrum(p, n=13).eigenvalues,
    "eigenpairs": lambda p: tg.noise.covariance_eigenpairs(p, 3).eigenvalues,
    "decoupling": lambda p: tg.noise.decoupling(p, k=3).ratio,
    "alignment": lambda p: tg.noise.alignment(p, k=5).exponent,
    "ensemble": lambda p: tg.noise.minibatch_losses(p, torch.eye(p.P)[:, :2], [-0.1, 0.1], batch_size=4).slopes,
    "epoch": lambda p: tg.noise.epoch_autocovariance(p, torch.eye(p.P)[:, :2], batch_size=3, epochs=40).autocovariance,
    "gaussianity": lambda p: tg.noise.gaussianity(p, torch.eye(p.P)[:, :2], batch_size=3, batches=50).tail_index,
}


def part_of(name: str) -> Any:
    """A module of the noise, also where a function of the same name hides it."""
    return importlib.import_module(f"thermograd.noise.{name}")


def interrupting(original: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """A function that is interrupted by Ctrl-C once it has been called so often."""
    seen = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] > calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", sorted(MEASUREMENTS))
def test_every_measurement_is_repeatable(name: str) -> None:
    first, second = (np.asarray(MEASUREMENTS[name](make("cnn-maxpool").problem())) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", sorted(MEASUREMENTS))
def test_every_measurement_names_the_sample_that_is_not_finite(name: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(14, 3).double()
    X[5] = 1e200  # its square overflows
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    problem = tg.Problem(model, lambda f, t: (f - t).square().mean(), (X, torch.zeros(14, 2)))
    with pytest.raises(NonFiniteError, match="sample 5 "):
        MEASUREMENTS[name](problem)


def test_a_gradient_that_is_not_finite_is_named_with_its_layer() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1e-200)
        model[1].weight.fill_(1.0)
    X = torch.ones(6, 1).double()
    X[4] = 1e300
    problem = tg.Problem(model, lambda f, t: (1e10 * f).sum(), (X, torch.zeros(6, 1)))
    with pytest.raises(NonFiniteError, match=r"gradient of sample 4 with respect to .*0\.weight"):
        PerLayer(problem).gram()


def test_a_loader_that_is_not_repeatable_is_refused() -> None:
    class Augmented(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(3), torch.zeros(1)

    with pytest.raises(DataError, match="something else each time"):
        tg.Problem(nn.Linear(3, 1), nn.MSELoss(), DataLoader(Augmented(), batch_size=4))


def test_strength_of_the_samples_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=400)
    whole = tg.noise.strength(problem)
    monkeypatch.setattr(tg.Problem, "gradient_chunk", property(lambda self: 20))
    monkeypatch.setattr(tg.Problem, "sample_gradients", interrupting(tg.Problem.sample_gradients, 10))
    with pytest.warns(ThermogradWarning, match="200 of 400 samples"):
        part = tg.noise.strength(problem)
    assert part.samples == 200
    assert abs(part.value - whole.value) < 4 * part.stderr


def test_lengths_taken_layer_by_layer_of_the_samples_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=400)
    whole = tg.noise.strength(problem)
    monkeypatch.setattr(part_of("gradients"), "_LARGE", 0)
    monkeypatch.setattr(PerLayer, "block_size", property(lambda self: 50))
    assert tg.noise.strength(problem).value == pytest.approx(whole.value, rel=1e-12)
    monkeypatch.setattr(PerLayer, "factors", interrupting(PerLayer.factors, 4))
    with pytest.warns(ThermogradWarning, match="200 of 400 samples"):
        part = tg.noise.strength(problem)
    assert abs(part.value - whole.value) < 4 * part.stderr


def test_noise_scale_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, module = teacher(samples=400), part_of("strength")
    whole = tg.noise.noise_scale(problem)

    with monkeypatch.context() as patch:  # while the samples' distances from the mean are measured
        patch.setattr(tg.Problem, "gradient_chunk", property(lambda self: 20))
        patch.setattr(tg.Problem, "sample_gradients", interrupting(tg.Problem.sample_gradients, 10))
        with pytest.warns(ThermogradWarning, match="200 of 400 samples"):
            part = tg.noise.noise_scale(problem)
    assert part.samples == 200
    assert np.isnan(part.curvature_weighted)
    assert "interrupted" in part.note
    assert whole.stderr < part.stderr < 3 * whole.stderr
    assert 0 < abs(part.simple - whole.simple) < 4 * part.stderr

    with monkeypatch.context() as patch:  # while the noise is combined
        patch.setattr(module, "combinations", interrupting(module.combinations, 0))
        with pytest.warns(ThermogradWarning, match="upper bound"):
            part = tg.noise.noise_scale(problem)
    assert part.simple == whole.simple
    assert np.isnan(part.curvature_weighted)
    assert whole.stderr < part.stderr < 3 * whole.stderr

    with monkeypatch.context() as patch:  # while parts of the samples are weighted by their curvature
        patch.setattr(module, "projections", interrupting(module.projections, 6))
        with pytest.warns(ThermogradWarning, match="6 of 10 parts"):
            part = tg.noise.noise_scale(problem)
    assert part.simple == whole.simple
    difference = abs(part.curvature_weighted - whole.curvature_weighted)
    assert 0 < difference < 4 * np.hypot(part.curvature_weighted_stderr, whole.curvature_weighted_stderr)

    monkeypatch.setattr(module, "projections", interrupting(module.projections, 2))
    with pytest.warns(ThermogradWarning, match="2 of 10 parts"):
        assert np.isnan(tg.noise.noise_scale(problem).curvature_weighted)


@pytest.mark.parametrize(("block", "calls"), [(13, 20), (13, 35), (1000, 7)])
def test_covariance_of_the_samples_whose_inner_products_are_done(
    block: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = teacher(samples=60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(part_of("covariance"), "_KEEP", 0)
    monkeypatch.setattr(part_of("covariance"), "_DENSE", 0)
    monkeypatch.setattr(part_of("factors"), "_TILE", 5)
    monkeypatch.setattr(PerLayer, "block_size", property(lambda self: min(block, self._most)))
    kind = type(tg.noise.covariance(problem).layers.factors(torch.arange(2))[0])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "gram", interrupting(kind.gram, calls))
        with pytest.warns(ThermogradWarning, match="of 60 samples, a random part"):
            pairs = tg.noise.covariance_eigenpairs(problem, 2, tol=1e-8)
    assert 2 <= pairs.products < 60
    true = tg.noise.covariance_eigenpairs(problem, 2, index=order[: pairs.products], tol=1e-8)
    torch.testing.assert_close(pairs.eigenvalues, true.eigenvalues, rtol=1e-10, atol=0)
    torch.testing.assert_close(pairs.eigenvectors, true.eigenvectors, rtol=0, atol=1e-7)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "gram", interrupting(kind.gram, calls))
        with pytest.warns(ThermogradWarning, match="a random part"):
            spectrum = tg.noise.covariance_spectrum(problem)
    assert spectrum.samples == pairs.products
    np.testing.assert_allclose(spectrum.eigenvalues[:2], true.eigenvalues, rtol=1e-10)
    assert (spectrum.eigenvalues_stderr[:2] > 0).all()
    monkeypatch.setattr(kind, "gram", interrupting(kind.gram, 0))
    with pytest.raises(KeyboardInterrupt):
        tg.noise.covariance_eigenpairs(problem, 2)


def test_small_covariance_of_the_samples_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(part_of("covariance"), "_KEEP", 0)
    monkeypatch.setattr(tg.Problem, "gradient_chunk", property(lambda self: 10))
    true = tg.noise.covariance_eigenpairs(problem, 4, index=order[:40])
    monkeypatch.setattr(tg.Problem, "sample_gradients", interrupting(tg.Problem.sample_gradients, 4))
    with pytest.warns(ThermogradWarning, match="40 of 60 samples"):
        part = tg.noise.covariance_eigenpairs(problem, 4)
    torch.testing.assert_close(part.eigenvalues, true.eigenvalues, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("large", [0, 2**30])
def test_directions_of_the_samples_that_are_done(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=400)
    D = torch.linalg.qr(torch.randn(problem.P, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    whole = tg.noise.in_directions(problem, D)
    monkeypatch.setattr(part_of("gradients"), "_LARGE", large)
    monkeypatch.setattr(PerLayer, "block_size", property(lambda self: 50))
    monkeypatch.setattr(tg.Problem, "gradient_chunk", property(lambda self: 50))
    np.testing.assert_allclose(tg.noise.in_directions(problem, D).variance, whole.variance, rtol=1e-12)
    where, name = (PerLayer, "factors") if large == 0 else (tg.Problem, "sample_gradients")
    original = getattr(where, name)

    def interrupted(measure: Callable[[], Any]) -> Any:
        calls = [0]

        def once(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 5:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, once)
        with pytest.warns(ThermogradWarning, match="200 of 400 samples"):
            return measure()

    part = interrupted(lambda: tg.noise.in_directions(problem, D))
    assert part.samples == 200
    assert (np.abs(part.variance - whole.variance) < 4 * part.stderr).all()
    block = interrupted(lambda: tg.noise.in_basis(problem, D))
    np.testing.assert_allclose(np.diag(block.covariance), part.variance, rtol=1e-10)
    assert interrupted(lambda: tg.noise.gaussianity(problem, D, batches=0)).batches == 200
    pairs = tg.landscape.eigenpairs(tg.landscape.hessian(problem), 5)
    found = interrupted(lambda: tg.noise.alignment(problem, H=pairs))
    assert np.isfinite(found.exponent_stderr)


def test_alignment_without_its_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, module = teacher(samples=40), part_of("alignment")
    whole = tg.noise.alignment(problem, k=5)
    monkeypatch.setattr(module, "covariance", interrupting(module.covariance, 0))
    with pytest.warns(ThermogradWarning, match="cosine"):
        part = tg.noise.alignment(problem, k=5)
    assert np.isnan(part.cosine)
    assert part.exponent == whole.exponent


def test_an_interrupt_before_anything_is_done_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=40)
    monkeypatch.setattr(tg.Problem, "sample_gradients", interrupting(tg.Problem.sample_gradients, 0))
    with pytest.raises(KeyboardInterrupt):
        tg.noise.strength(problem)


def test_points_of_a_path_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=40)
    thetas = torch.stack([problem.theta * (1 + 0.1 * i) for i in range(6)])
    whole = tg.noise.strength_along(problem, thetas)
    monkeypatch.setattr(part_of("strength"), "strength", interrupting(tg.noise.strength, 4))
    with pytest.warns(ThermogradWarning, match="4 of 6 points"):
        part = tg.noise.strength_along(problem, thetas)
    np.testing.assert_allclose(part.strength, whole.strength[:4])


def test_directions_of_an_ensemble_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, module = teacher(samples=40), part_of("ensemble")
    D = torch.eye(problem.P)[:, :4]
    whole = tg.noise.minibatch_losses(problem, D, [-0.1, 0.1], batch_size=8)
    monkeypatch.setattr(module, "_evaluate", interrupting(module._evaluate, 5))
    with pytest.warns(ThermogradWarning, match="2 of 4 directions"):
        part = tg.noise.minibatch_losses(problem, D, [-0.1, 0.1], batch_size=8)
    for name in ("offsets", "full_losses", "curvature", "gradient_variance"):
        axis = 1 if name == "curvature" else 0
        np.testing.assert_array_equal(getattr(part, name), np.take(getattr(whole, name), [0, 1], axis))
    part.to_xarray()


def test_runs_of_epochs_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, module = teacher(samples=60), part_of("epoch")
    monkeypatch.setattr(module, "_series", interrupting(module._series, 7))
    with pytest.warns(ThermogradWarning, match="7 of 20 runs"):
        part = tg.noise.epoch_autocovariance(problem, torch.eye(problem.P)[:, :2], batch_size=10)
    assert (np.abs(part.autocovariance - part.expected) < 6 * part.stderr + 1e-12).all()


def test_samples_of_decoupling_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, module = teacher(samples=200), part_of("decoupling")
    whole = tg.noise.decoupling(problem, k=4)
    monkeypatch.setattr(tg.Problem, "gradient_chunk", property(lambda self: 10))
    monkeypatch.setattr(module, "_mapped_jacobian", interrupting(module._mapped_jacobian, 12))
    with pytest.warns(ThermogradWarning, match="120 of 200 samples"):
        part = tg.noise.decoupling(problem, k=4)
    assert part.samples == part.spectrum_samples == 120
    assert abs(part.ratio - whole.ratio) < 4 * part.stderr


@pytest.mark.parametrize("name", ["cnn-maxpool", "transformer", "weights-smoothing"])
def test_too_little_memory_halves_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(name).problem(chunk_size=None)
    D = torch.randn(problem.P, 2, generator=torch.Generator().manual_seed(0)).double()
    layers = PerLayer(problem)
    K, along, mean = layers.gram(), layers.project(D.T.contiguous()), layers.mean()
    squares, diagonal, image = layers.squares(), layers.mean_squares(), layers.product(D.T.contiguous(), mean)
    original = PerLayer.factors

    def factors(self: PerLayer, positions: torch.Tensor) -> Any:
        if len(positions) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, positions)

    monkeypatch.setattr(PerLayer, "factors", factors)
    for one, other in (
        (PerLayer(problem).gram(), K),
        (PerLayer(problem).project(D.T.contiguous()), along),
        (PerLayer(problem).mean(), mean),
        (PerLayer(problem).squares(), squares),
        (PerLayer(problem).mean_squares(), diagonal),
        (PerLayer(problem).product(D.T.contiguous(), mean), image),
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13 * float(other.abs().max()))


def test_too_little_memory_halves_blocks_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = teacher(samples=30)
    whole = tg.noise.strength(problem)
    original = tg.Problem.sample_gradients

    def gradients(self: tg.Problem, theta: Any = None, index: Any = None) -> torch.Tensor:
        if len(index) > 4:
            raise MemoryError
        return original(self, theta, index)

    monkeypatch.setattr(tg.Problem, "sample_gradients", gradients)
    assert tg.noise.strength(problem).value == pytest.approx(whole.value, rel=1e-12)


def test_cost_is_told_beforehand_and_by_the_bar() -> None:
    problem = make("cnn-maxpool").problem()
    cost = tg.noise.covariance(problem).cost(k=3)
    assert 0 < cost.seconds < 10
    assert cost.bytes > problem.N**2 * 8
    with bar("work", total=4, bytes=2**20) as progress:
        progress.advance()
        assert progress.description.startswith("work, about ")
        assert progress.description.endswith("1 MiB")
