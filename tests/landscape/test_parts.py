"""Sub-blocks, shifts and projections act like the matrices they stand for."""

from __future__ import annotations

import pytest
import torch

import thermograd as tg
from thermograd.errors import InputError
from thermograd.landscape import eigenpairs, hessian, positions, projected, shifted, sub_block

from .networks import make


def test_a_layers_block_is_the_hessian_of_that_layer() -> None:
    case = make("subset")
    whole = tg.Problem(case.model, case.loss, (case.X, case.y))
    found = sub_block(hessian(whole), positions(whole, "2.*"))
    torch.testing.assert_close(found.dense(), hessian(case.problem()).dense(), atol=1e-13, rtol=1e-10)
    assert len(positions(whole, ["0", "4.bias"])) == case.model[0].weight.numel() + 6 + 3
    with pytest.raises(InputError):
        positions(whole, "7.*")
    for bad in ([0, 0], [-1], [whole.P], [0.5]):
        with pytest.raises(InputError):
            sub_block(hessian(whole), bad)


def test_shift_and_projections() -> None:
    H = hessian(make("mlp-mse").problem())
    A = H.dense()
    one = torch.eye(len(A), dtype=torch.float64)
    torch.testing.assert_close(shifted(H, -0.5).dense(), A - 0.5 * one)
    top = eigenpairs(H, 3)
    Q = top.eigenvectors
    torch.testing.assert_close(projected(H, 2 * Q).dense(), Q @ torch.diag(top.eigenvalues) @ Q.T, atol=1e-9, rtol=0)
    rest = projected(H, top, complement=True)
    torch.testing.assert_close(eigenpairs(rest, 1).eigenvalues, eigenpairs(H, 4).eigenvalues[3:], atol=1e-9, rtol=0)
    with pytest.raises(InputError):
        projected(H, Q.T)
    with pytest.raises(InputError):
        shifted(H, float("nan"))
