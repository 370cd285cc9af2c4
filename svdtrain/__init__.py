"""svdtrain: watch the spectra of a GPT while it trains, switch matrices to low-rank training and back.

    svd = svdtrain.attach(model, optimizer)     one line in any loop

Names are loaded on first use, so that the command line and the monitor start without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdtrain.adaptive.attach import attach
    from svdtrain.adaptive.controller import AdaptiveSVD
    from svdtrain.adaptive.linear import AdaptiveSVDLinear
    from svdtrain.config import SVDConfig
    from svdtrain.trainer.hooks import Hook
    from svdtrain.trainer.loop import Trainer

__version__ = "0.1.0"
__all__ = ["AdaptiveSVD", "AdaptiveSVDLinear", "Hook", "SVDConfig", "Trainer", "attach"]

_HOME = {
    "attach": "svdtrain.adaptive.attach",
    "AdaptiveSVD": "svdtrain.adaptive.controller",
    "AdaptiveSVDLinear": "svdtrain.adaptive.linear",
    "SVDConfig": "svdtrain.config",
    "Hook": "svdtrain.trainer.hooks",
    "Trainer": "svdtrain.trainer.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'svdtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
