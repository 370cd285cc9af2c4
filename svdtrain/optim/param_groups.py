"""Which parameter is stepped how: nanochat's groups, read off the parameter names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from svdtrain.config import OptimConfig

REFERENCE_WIDTH = 768  # width at which the AdamW learning rates were tuned

# role -> (betas, weight decay, factor on its learning rate)
_ADAMW_ROLES: dict[str, tuple[tuple[float, float], float]] = {
    "lm_head": ((0.8, 0.96), 0.01),
    "wte": ((0.8, 0.995), 0.001),
    "value_embeds": ((0.8, 0.995), 0.01),
    "resid_lambdas": ((0.8, 0.95), 0.05),
    "x0_lambdas": ((0.96, 0.95), 0.0),
    "smear_backout": ((0.8, 0.95), 0.0),
    "block_other": ((0.8, 0.95), 0.0),
}
SMEAR_LR = 0.2


def build_param_groups(
    model: nn.Module,
    optim_config: OptimConfig,
    *,
    lr_scale: float = 1.0,
    weight_decay: float | None = None,
    non_matrices: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for MuonAdamW: one per AdamW role, and one Muon group per shape of the blocks' matrices.

    lr_scale: factor for the batch size (`schedule.batch_lr_scale`); as in nanochat it does not touch the smear group.
    non_matrices: names of 2-D parameters of the blocks that are no matrices in spirit (poles, gates, taps): AdamW too.
    weight_decay: of the matrices; None takes optim_config's. Embedding and head rates also scale with width^-1/2.
    Frozen parameters are in no group. Raises ValueError for a parameter it has no role for.
    """
    roles: dict[str, list[Tensor]] = {name: [] for name in _ADAMW_ROLES}
    matrices: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "block_other" if name in non_matrices else _role(name, parameter)
        (matrices if role == "matrix" else roles[role]).append(parameter)
    width = model.get_parameter("lm_head.weight").shape[1]
    rates = _adamw_rates(optim_config, lr_scale, (width / REFERENCE_WIDTH) ** -0.5)
    groups = [_adamw_group(role, params, rates[role]) for role, params in roles.items() if params]
    decay = optim_config.weight_decay if weight_decay is None else weight_decay
    groups += _muon_groups(matrices, optim_config.matrix_lr * lr_scale, decay)
    _check_complete(model, groups)
    return groups


def _role(name: str, parameter: Tensor) -> str:
    """Role of a parameter by its name: a key of the AdamW roles, or `matrix`."""
    for prefix, role in (
        ("lm_head.", "lm_head"),
        ("transformer.wte.", "wte"),
        ("value_embeds.", "value_embeds"),
        ("resid_lambdas", "resid_lambdas"),
        ("x0_lambdas", "x0_lambdas"),
        ("smear_", "smear_backout"),
        ("backout_", "smear_backout"),
    ):
        if name.startswith(prefix):
            return role
    if name.startswith("transformer.h."):
        return "matrix" if parameter.dim() == 2 and min(parameter.shape) > 0 else "block_other"
    raise ValueError(f"no parameter group is known for {name!r}; add its role to svdtrain/optim/param_groups.py")


def _adamw_rates(config: OptimConfig, lr_scale: float, width_scale: float) -> dict[str, float]:
    return {
        "lm_head": config.unembedding_lr * lr_scale * width_scale,
        "wte": config.embedding_lr * lr_scale * width_scale,
        "value_embeds": 0.5 * config.embedding_lr * lr_scale * width_scale,
        "resid_lambdas": 0.01 * config.scalar_lr * lr_scale,
        "x0_lambdas": config.scalar_lr * lr_scale,
        "smear_backout": SMEAR_LR,
        "block_other": 0.01 * config.scalar_lr * lr_scale,
    }


def _adamw_group(role: str, params: list[Tensor], lr: float) -> dict[str, Any]:
    betas, weight_decay = _ADAMW_ROLES[role]
    return {
        "kind": "adamw",
        "name": role,
        "params": params,
        "lr": lr,
        "initial_lr": lr,
        "betas": betas,
        "eps": 1e-10,
        "weight_decay": weight_decay,
    }


def _muon_groups(matrices: list[Tensor], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """One group per shape, shapes in ascending order, as nanochat builds them."""
    groups = []
    for shape in sorted({tuple(p.shape) for p in matrices}):
        groups.append(
            {
                "kind": "muon",
                "name": "muon_" + "x".join(map(str, shape)),
                "params": [p for p in matrices if tuple(p.shape) == shape],
                "lr": lr,
                "initial_lr": lr,
                "momentum": 0.95,
                "ns_steps": 5,
                "beta2": 0.9,
                "weight_decay": weight_decay,
                "initial_weight_decay": weight_decay,
            }
        )
    return groups


def _check_complete(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}, "a parameter is in no group"
