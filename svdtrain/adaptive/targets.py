"""Which parameters are watched: by family (attn, mlp, all) or by regular expression."""

from __future__ import annotations

import re
import warnings

from torch import nn

_ATTENTION = (
    r"(^|\.)\w*att(n|ention)\w*\.(c_q|c_k|c_v|c_proj|c_attn|q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|qkv)\."
)
_MLP = r"(^|\.)\w*(mlp|ffn|feed_forward)\w*\.(c_fc|c_proj|gate_proj|up_proj|down_proj|fc1|fc2|w1|w2|w3)\."
_FAMILIES = {"attn": _ATTENTION, "mlp": _MLP, "all": f"({_ATTENTION})|({_MLP})"}
_SMALLEST_SIDE = 16  # below this a spectrum has no principal and minor part to speak of


def select_targets(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """The 2-D parameters (smaller side >= 16) that `pattern` names, in the model's order, by short name.

    `pattern`: attn, mlp, all, or a regular expression searched in the parameter's name. Frozen parameters are left out
    with a warning. Raises ValueError when nothing else matches, or when a match is shared by several modules.
    """
    names = _names_by_parameter(model)
    try:
        matcher = re.compile(_FAMILIES.get(pattern, pattern))
    except re.error as error:
        raise ValueError(f"svd_targets={pattern!r} is not attn, mlp, all or a regular expression: {error}") from error
    targets: dict[str, nn.Parameter] = {}
    frozen = []
    for parameter, aliases in names.values():
        if not any(matcher.search(name) for name in aliases):
            continue
        if parameter.ndim != 2 or min(parameter.shape) < _SMALLEST_SIDE or not parameter.is_floating_point():
            continue
        if len(aliases) > 1:
            raise ValueError(
                f"{' and '.join(aliases)} share one parameter, which cannot be factorised; leave it out of "
                f"svd_targets={pattern!r}"
            )
        if not parameter.requires_grad:
            frozen.append(aliases[0])
            continue
        targets[short_name(aliases[0])] = parameter
    if frozen and not targets:
        raise ValueError(
            f"all {len(frozen)} parameters that svd_targets={pattern!r} matches are frozen, e.g. {frozen[0]}"
        )
    if frozen:
        warnings.warn(f"frozen parameters are not watched: {', '.join(frozen)}", stacklevel=3)
    if not targets:
        raise ValueError(_nothing_matched(pattern, [alias for _, aliases in names.values() for alias in aliases]))
    return targets


def short_name(name: str) -> str:
    """The name used in records: without the prefixes of wrappers and of GPTs, and without a trailing `.weight`."""
    return _unwrapped(name).removeprefix("transformer.").removesuffix(".weight")


def _unwrapped(name: str) -> str:
    """Without what DistributedDataParallel (`module.`), torch.compile (`_orig_mod.`) and Lightning Fabric, which holds
    a module twice, put into names."""
    return re.sub(r"^((_orig_mod|module|_forward_module|_original_module)\.)+", "", name).replace("._orig_mod.", ".")


def _names_by_parameter(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all the names it goes by; wrapper prefixes removed."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases = found.setdefault(id(parameter), (parameter, []))[1]
        if _unwrapped(name) not in aliases:
            aliases.append(_unwrapped(name))
    return found


def _nothing_matched(pattern: str, names: list[str]) -> str:
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"svd_targets={pattern!r} matches no 2-D parameter with both sides of at least {_SMALLEST_SIDE}; "
        f"parameters are named like: {shown or '(the model has none)'}; give a regular expression that finds them"
    )
