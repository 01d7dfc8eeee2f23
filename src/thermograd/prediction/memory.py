r"""How much of the noise that the spread of the weights causes is repeated from batch to batch of an epoch.

The gradient of sample i at :math:`\theta^*+\delta` differs from that at :math:`\theta^*` by :math:`a_i=H_i\delta`.
Batches of one epoch share no sample, so that their noise is anticorrelated: for the part that does not depend on the
weights by :math:`-\sigma^2/(N-1)` between any two samples. For the part that does, it is
:math:`-E\,a_i(j)\,a_i(k)/(N-1)`, which falls off as the weights move on between batches j and k. For modes that
are slower than an epoch the sum over an epoch counts, hence the mean of that correlation over all pairs of its batches,

.. math:: \varphi = \frac{\mathrm{Var}(\bar\delta_{epoch})}{\mathrm{Var}(\delta)},

the modes of :math:`\delta` weighted by their energy; modes that are faster hardly notice either way. The share
:math:`\varphi` is taken as noise that stays the same over the epoch, :math:`1-\varphi` as noise drawn anew each step.
With momentum near one the weights move slower than an epoch and :math:`\varphi` approaches one.

Derived here; tested against simulated linear regression.
"""

from __future__ import annotations

import numpy as np

from ..hyperparameters import SGD
from ..theory import sampling as schemes
from ..theory.arrays import Array

__all__ = ["repeated_share"]

_ROUNDS = 3  # the share depends on the spread, and the spread a little on the share


def repeated_share(
    sgd: SGD, curvature: Array, energy: Array, coloured: Array, white: Array, batches: int, *, drop_last: bool = False
) -> float:
    """Share of the spread's noise that stays the same over an epoch, between 0 and 1; 0 for independent batches.

    Args:
        sgd: hyperparameters with a batch size.
        curvature: Hessian eigenvalues without weight decay, [n].
        energy: weight of each mode, [n].
        coloured: variance over samples of the noise that does not depend on the spread, [n].
        white: that of the noise that does, [n].
        batches: of an epoch.
        drop_last: whether a short last batch is dropped.

    Raises:
        UnstableError: a mode diverges or has no stationary variance.

    >>> sgd = SGD(lr=1e-3, momentum=0.99, batch_size=10, dataset_size=100, sampling="reshuffle")
    >>> one = np.ones(1)
    >>> slow = repeated_share(sgd, one, one, one, one, 10)
    >>> fast = repeated_share(sgd.replace(lr=0.5, momentum=0.0), one, one, one, one, 10)
    >>> bool(slow > 0.9 > 0.3 > fast)
    True
    """
    if sgd.sampling == "replacement" or batches < 2 or not white.any():
        return 0.0
    anew, factor = sgd.replace(sampling="replacement"), sgd.minibatch_factor

    def spread(scheme: SGD, noise: Array) -> Array:
        """Energy of the spread, and of its part within an epoch, [2]."""
        noise = noise * factor
        within = schemes.weight_variance_window(scheme, curvature, noise, batches, drop_last=drop_last)
        return np.array(
            [energy @ schemes.weight_variance(scheme, curvature, noise, drop_last=drop_last), energy @ within]
        )

    fixed, repeated, fresh = spread(sgd, coloured), spread(sgd, white), spread(anew, white)
    share = 1.0
    for _ in range(_ROUNDS):
        whole, within = fixed + share * repeated + (1 - share) * fresh
        share = float(np.clip(1 - within / whole, 0.0, 1.0)) if whole > 0 else 0.0
    return share
