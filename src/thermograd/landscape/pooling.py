"""Where the winners of a max-pooling lie."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Places"]


class Places:
    """Where the winners of a max-pooling lie in the input's memory, samples first and channels last."""

    def __init__(self, indices: Tensor, shape: torch.Size):
        N, C, H, W = shape
        channel = torch.arange(C, device=indices.device).view(1, C, 1, 1)
        sample = torch.arange(N, device=indices.device).view(N, 1, 1, 1)
        flat = (sample * (H * W) + indices) * C + channel
        small = N * C * H * W < 2**31  # half the memory, and picked faster
        self.flat = flat.permute(0, 2, 3, 1).reshape(-1).to(torch.int32 if small else torch.int64)  # [N h w C]
        self.inside, self.outside = shape, indices.shape

    @classmethod
    def of(cls, indices: Tensor, shape: torch.Size) -> Places:
        """The same for the pooling and its backward pass, which share their indices."""
        places: Places | None = getattr(indices, "_places", None)
        if places is None:
            places = cls(indices, shape)
            setattr(indices, "_places", places)  # noqa: B010
        return places

    def take(self, block: Tensor) -> Tensor:
        """From [k, N, C, H, W] to the pooled [k, N, C, h, w]."""
        k, (N, C, h, w) = len(block), self.outside
        rows = block.permute(0, 1, 3, 4, 2).reshape(k, -1)
        out = torch.stack([row.index_select(0, self.flat) for row in rows])
        return out.view(k, N, h, w, C).permute(0, 1, 4, 2, 3)

    def put(self, block: Tensor) -> Tensor:
        """The transpose of :meth:`take`."""
        k, (N, C, H, W) = len(block), self.inside
        rows = block.permute(0, 1, 3, 4, 2).reshape(k, -1)
        out = rows.new_zeros(k, N * C * H * W)
        for target, row in zip(out, rows):
            target.index_add_(0, self.flat, row)
        return out.view(k, N, H, W, C).permute(0, 1, 4, 2, 3)
