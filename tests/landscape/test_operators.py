"""The algebra of operators."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator, eigsh

from thermograd.errors import InputError, NonFiniteError
from thermograd.landscape import MatrixOperator, as_operator


def symmetric(size: int, seed: int) -> torch.Tensor:
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + A.T


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 1000),
    a=st.floats(-5, 5),
    b=st.floats(-5, 5),
    columns=st.integers(1, 4),
)
def test_sums_and_multiples_act_like_matrices(size: int, seed: int, a: float, b: float, columns: int) -> None:
    A, B = symmetric(size, seed), symmetric(size, seed + 1)
    block = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    combined = a * MatrixOperator(A) - b * as_operator(B) + A / 2
    expected = (a + 0.5) * A - b * B
    torch.testing.assert_close(combined @ block, expected @ block, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(combined.dense(), expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close((-combined) @ block[:, 0], -expected @ block[:, 0], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(sum([MatrixOperator(A), MatrixOperator(B)]).dense(), A + B)


def test_numpy_scalars_multiply_from_the_left() -> None:
    A = symmetric(3, 0)
    torch.testing.assert_close((np.float64(2.0) * MatrixOperator(A)).dense(), 2 * A)


class Foreign:
    """Like a curvlinops operator: .shape, .dtype and @ on torch blocks, nothing else."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        assert isinstance(block, torch.Tensor)
        return self.matrix @ block


@pytest.mark.parametrize(
    "wrap",
    [
        lambda A: A,
        lambda A: A.numpy(),
        lambda A: A.tolist(),
        lambda A: aslinearoperator(A.numpy()),
        lambda A: scipy.sparse.csr_matrix(A.numpy()),
        Foreign,
        lambda A: as_operator(A).to_scipy(),
    ],
)
def test_foreign_operators(wrap: object) -> None:
    A = symmetric(7, 3)
    operator = as_operator(wrap(A))
    block = torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(operator @ block, A @ block)
    torch.testing.assert_close(operator @ block[:, 0], A @ block[:, 0])
    np.testing.assert_allclose(operator @ block.numpy(), (A @ block).numpy())


def test_scipy_finds_the_same_eigenvalues() -> None:
    A = symmetric(30, 5)
    found = eigsh(as_operator(A).to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(A)[-3:].numpy(), rtol=1e-10)


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 3.0, object()])
def test_what_is_no_operator_is_refused(bad: object) -> None:
    with pytest.raises(InputError):
        as_operator(bad)


def test_shapes_and_finiteness_are_checked() -> None:
    A = as_operator(torch.eye(3))
    with pytest.raises(InputError):
        A + torch.eye(4)
    with pytest.raises(InputError):
        A * float("nan")
    with pytest.raises(NonFiniteError):
        as_operator(torch.full((2, 2), torch.inf))
