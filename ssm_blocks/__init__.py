"""Seven swappable state-space sequence mixers, correct by construction: see docs/SSM.md."""

from ssm_blocks.mixer import Mixer, State, available, build, non_matrix_parameters, register

__all__ = ["Mixer", "State", "available", "build", "non_matrix_parameters", "register"]
