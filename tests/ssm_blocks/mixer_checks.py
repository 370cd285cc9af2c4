"""What every mixer has to satisfy, written once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_blocks import Mixer, State, available, build

DIM = 8
SMALL: dict[str, dict] = {name: {"num_heads": 2} for name in available()}
for _name in SMALL:
    if _name.startswith(("diagonal", "linoss", "dplr_lti", "dplr_plain", "dplr_similarity")):
        SMALL[_name]["state_size"] = 5
    if _name == "segmented_hss":
        SMALL[_name] = {"num_heads": 1, "leaf_size": 2, "rank": 1}
    if _name in ("oscillatory_dplr", "adaptive_dplr"):
        SMALL[_name] |= {"state_size": 5, "rank": 2}
    if _name == "monarch":
        SMALL[_name] |= {"block_size": 2, "num_householder": 2}
    if _name.startswith("monarch_"):
        SMALL[_name]["block_size"] = 2


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(mixer: Mixer, seed: int = 0, scale: float = 0.5) -> Mixer:
    """Every parameter moved away from its first value, so that no path is dead or symmetric."""
    generator = torch.Generator().manual_seed(seed)
    mixer.init_weights(generator)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (scale * noise / max(1, parameter.ndim == 2) ** 0.5).to(parameter.dtype) * 0.3
    return mixer


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> Mixer:
    return randomised(build(name, DIM, **SMALL[name], **options).to(dtype))


def random_state(mixer: Mixer, batch: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> State:
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        noise = torch.randn(
            value.shape, generator=generator, dtype=torch.complex128 if value.is_complex() else torch.float64
        )
        return (value.detach() + 0.5 * noise).to(value.dtype)

    return {name: moved(value) for name, value in mixer.init_state(batch, dtype=dtype).items()}


def narrow(state: State) -> State:
    """A float64 state as float32."""
    return {name: value.to(torch.complex64 if value.is_complex() else torch.float32) for name, value in state.items()}


def run(mixer: Mixer, form: str, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """form: parallel, reference, or step: a loop over `step`."""
    if form == "step":
        state = mixer.init_state(x.size(0), dtype=x.dtype) if state is None else state
        outputs = []
        for t in range(x.size(1)):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, 1), state
    mixer.backend = "reference" if form == "reference" else "torch"
    return mixer(x, state, return_state=True)


def everything(mixer: Mixer, form: str, x: Tensor, state: State | None) -> dict[str, Tensor]:
    """Outputs, last state, and the gradients of a random functional of both to input, state and parameters."""
    x = x.clone().requires_grad_()
    leaves = {"grad x": x, **{f"grad {name}": p for name, p in mixer.named_parameters()}}
    if state is not None:
        state = {name: value.clone().requires_grad_() for name, value in state.items()}
        leaves |= {f"grad state {name}": value for name, value in state.items()}
    y, last = run(mixer, form, x, state)
    found = {"y": y, **{f"last {name}": value for name, value in last.items()}}
    loss = torch.zeros((), dtype=torch.float64)
    for seed, value in enumerate(found.values()):
        value = torch.view_as_real(value) if value.is_complex() else value
        loss = loss + (value.double() * rand(*value.shape, seed=100 + seed)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Entry by entry, relative to the larger of 1 and the entry's size."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.numel() == 0:
            continue
        error = (got[name] - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: {error:.2e}"


def assert_rms_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    """Root mean square of the difference at most `ratio` of the root mean square of the value."""
    for name, value in want.items():
        if value.numel() == 0:
            continue
        error = (got[name].to(value.dtype) - value).abs().square().mean().sqrt().item()
        size = value.abs().square().mean().sqrt().item()
        assert error <= ratio * size + 1e-9, f"{name}: {error:.2e} of {size:.2e}"


def parameters_with_names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}
