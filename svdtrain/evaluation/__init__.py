"""Benchmarks of a trained model."""

from svdtrain.evaluation.core import CoreBundle, CoreResult, CoreTask, evaluate_core

__all__ = ["CoreBundle", "CoreResult", "CoreTask", "evaluate_core"]
