"""Settings of the tracked engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from svdtrain.spectral.subspace import RitzWay


@dataclass(frozen=True, kw_only=True)
class TrackerSettings:
    """How often, how wide, how exact."""

    interval: int = 20
    """Steps between two analyses of one matrix."""
    exact_every: int = 20
    """Every so many analyses the exact decomposition; 1: always. Warm errors do not add up, so age is the least of the
    three reasons for one; every tenth time it was two fifths of what tracking costs."""
    exact_together: bool | None = None
    """Matrices that are analysed together are also exact together; None: on a GPU, where one takes half as long as ten,
    and the step beside it is slower all that while."""
    exact_interval_factor: int = 4
    """Matrices too wide to track (see widest_share) are analysed this many times less often, exactly."""
    oversample: int = 32
    """Directions carried beside the k principal ones."""
    widest_share: float = 0.5
    """Bases wider than this share of g are not worth iterating: exact."""
    residual_tolerance: float = 1e-3
    """||W V - U S||_F / ||S||_2 of the principal columns that warm iterations must reach; about a tenth of the error
    of the largest angle, radians. Where they do not, the next analysis is exact."""
    max_iterations: int | None = None
    """Warm iterations of one analysis at most, filtered ones from the second on; None: 8 on a GPU, where an exact
    decomposition costs as much as many, 4 on the CPU. With 1 nothing looks at the residual before the analysis ends."""
    skip_tolerance: float = 0.0
    """The same of the *old* basis, below which an analysis is skipped; 0: never."""
    ritz: RitzWay | Literal["auto"] = "auto"
    """The small eigenvalue problem; auto: eigh on the CPU; on a GPU refine, and hybrid above 192 columns."""
    chunk: int = 80
    """Matrices stacked at once: bounds temporary memory."""
    participation_every: int | None = None
    """The participation ratio of a matrix is renewed every so many steps; None: every step on a GPU, 32 on the CPU."""
    gradient_right_side: bool | None = None
    """Also the gradient's share on the right (input) side; None: on a GPU. The update's is always there."""
    stagger: int | None = None
    """Groups of matrices that are analysed at different steps; None: 4 on a GPU, 2 on the CPU. An analysis is hundreds
    of small kernels whatever its number of matrices, so few groups cost less than an even load."""
    offset: int = 0
    """Analyses fall on the steps with (step + offset) % interval = 0, and evenly between them for the other groups."""
    fast_dtype: torch.dtype | None = None
    """Arithmetic of the fast lane's products; None: bfloat16 with float32 accumulation on a GPU, float32 on the CPU."""

    def __post_init__(self) -> None:
        counts = ("interval", "exact_every", "exact_interval_factor", "oversample", "chunk", "max_iterations")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
