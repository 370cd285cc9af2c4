"""The method: factorise on the optimizer's side of the gradient, decide per matrix, switch both ways."""

from svdtrain.adaptive.attach import AttachedSVD, attach
from svdtrain.adaptive.controller import AdaptiveSVD
from svdtrain.adaptive.factors import FactoredWeight
from svdtrain.adaptive.linear import AdaptiveSVDLinear
from svdtrain.adaptive.policy import Measurement, should_use_lowrank_training
from svdtrain.adaptive.registration import Adapter, Reregister
from svdtrain.adaptive.shadow import Shadow
from svdtrain.adaptive.target import Change, Target

__all__ = [
    "Adapter",
    "AdaptiveSVD",
    "AdaptiveSVDLinear",
    "AttachedSVD",
    "Change",
    "FactoredWeight",
    "Measurement",
    "Reregister",
    "Shadow",
    "Target",
    "attach",
    "should_use_lowrank_training",
]
