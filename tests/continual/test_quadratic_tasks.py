"""On linear models a task's loss is a parabola, and everything a constraint says can be known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from thermograd.continual import EWC, Constraint, L2ToAnchor, LandscapeConstraint, LayerLandscape, SynapticIntelligence

from .conftest import least_squares, linear, regression

LOSS = nn.MSELoss()


def exact(**options: Any) -> LandscapeConstraint:
    return LandscapeConstraint(rank=5, weights="curvature", **options)


def at_minimum(*tasks: Any) -> nn.Linear:
    model = linear()
    with torch.no_grad():
        model.weight.copy_(least_squares(*tasks)[None])
    return model


MAKERS = [exact, lambda: exact(directions="hessian"), lambda: LayerLandscape(memory_per_weight=None)]


@pytest.mark.parametrize("make", MAKERS)
def test_penalty_is_the_rise_of_the_loss(make: Any) -> None:
    X, y = regression(0)
    model = at_minimum((X, y))
    constraint = make().fit(model, LOSS, (X, y))
    base = LOSS(model(X), y)
    for seed in range(3):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.weight.add_(torch.randn(1, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        assert constraint.penalty(moved).item() == pytest.approx((LOSS(moved(X), y) - base).item(), rel=1e-6)


def test_weights_from_the_flatness_are_the_curvature_of_a_parabola() -> None:
    X, y = regression(3)
    model = at_minimum((X, y))
    by_width = LandscapeConstraint(rank=3).fit(model, LOSS, (X, y)).form
    by_eigenvalue = LandscapeConstraint(rank=3, weights="curvature").fit(model, LOSS, (X, y)).form
    torch.testing.assert_close(by_width.curvature, by_eigenvalue.curvature, rtol=1e-3, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("how", ["proximal", "penalty"])
def test_tasks_one_after_the_other_end_at_the_joint_minimum(momentum: float, how: str) -> None:
    tasks = [regression(seed) for seed in (4, 5, 6)]
    model, constraint = linear(), exact(capacity=5)
    for X, y in tasks:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 - momentum), momentum=momentum)
        for _ in range(400):
            optimizer.zero_grad()
            loss = LOSS(model(X), y)
            (loss + constraint.penalty(model) if how == "penalty" else loss).backward()
            optimizer.step()
            if how == "proximal":
                constraint.proximal_step(model, optimizer)
        constraint.fit(model, LOSS, (X, y))
    torch.testing.assert_close(model.weight[0].detach(), least_squares(*tasks), rtol=1e-6, atol=1e-6)


def test_own_anchors_are_the_sum_of_the_tasks_terms() -> None:
    tasks = [regression(seed) for seed in (4, 5)]
    both, apart = exact(anchors="own", capacity=5), [exact(), exact()]
    for one, task in zip(apart, tasks):
        model = at_minimum(task)
        both.fit(model, LOSS, task)
        one.fit(model, LOSS, task)
    probes = [linear() for _ in range(3)]
    difference = [both.penalty(m).item() - sum(one.penalty(m).item() for one in apart) for m in probes]
    assert max(difference) - min(difference) < 1e-9  # equal up to a constant


@pytest.mark.parametrize(
    "constraint", [exact(strength=1e300), EWC(1e300), L2ToAnchor(1e300), LayerLandscape(1e300, memory_per_weight=None)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_strength_makes_the_proximal_step_diverge(constraint: Constraint, dtype: torch.dtype) -> None:
    constraint = copy.deepcopy(constraint)
    X, y = (part.to(dtype) for part in regression(7))
    model = linear().to(dtype)
    constraint.fit(model, LOSS, (X, y))
    anchor = model.weight.detach().clone()
    assert math.isfinite(constraint.penalty(model).item())  # not infinity times zero
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (1e3 * LOSS(model(X), y)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        constraint.proximal_step(model, optimizer)
    torch.testing.assert_close(model.weight.detach(), anchor, rtol=1e-4, atol=1e-4)


def test_synaptic_intelligence_is_its_definition() -> None:
    X, y = regression(8)
    model, si = linear(), SynapticIntelligence(xi=0.3)
    start, work = model.weight.detach().clone(), torch.zeros(1, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    with si.watch(model, optimizer):
        for _ in range(60):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            LOSS(model(X), y).backward()
            gradient = model.weight.grad.clone()
            optimizer.step()
            work -= gradient * (model.weight.detach() - before)
    si.fit(model, LOSS, (X, y))
    expected = work.clamp_min(0) / ((model.weight.detach() - start).square() + 0.3)
    torch.testing.assert_close(si.form.curvature, expected[0])


def test_synaptic_work_of_small_steps_adds_up_to_the_fall_of_the_loss() -> None:
    X, y = regression(8)
    model, si = linear(), SynapticIntelligence(xi=1.0)
    before, start = LOSS(model(X), y).item(), model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    with si.watch(model, optimizer):
        for _ in range(800):
            optimizer.zero_grad()
            LOSS(model(X), y).backward()
            optimizer.step()
    work = si._path.work.sum().item()
    assert work == pytest.approx(before - LOSS(model(X), y).item(), rel=0.01)
    assert not torch.equal(start, model.weight)


@pytest.mark.parametrize("how", ["proximal", "penalty"])
def test_synaptic_work_is_that_of_the_tasks_own_gradient(how: str) -> None:
    first, (X, y) = regression(8), regression(9)
    model, si = linear(), SynapticIntelligence(strength=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with si.watch(model, optimizer):
        optimizer.zero_grad()
        LOSS(model(first[0]), first[1]).backward()
        optimizer.step()
    si.fit(model, LOSS, first)
    work = torch.zeros(5, dtype=torch.float64)
    with si.watch(model, optimizer):
        for _ in range(30):
            before = model.weight.detach().clone()
            (own,) = torch.autograd.grad(LOSS(model(X), y), model.weight)
            optimizer.zero_grad()
            (LOSS(model(X), y) + (si.penalty(model) if how == "penalty" else 0)).backward()
            optimizer.step()
            if how == "proximal":
                si.proximal_step(model, optimizer)
            work -= (own * (model.weight.detach() - before))[0]
    torch.testing.assert_close(si._path.work, work)
