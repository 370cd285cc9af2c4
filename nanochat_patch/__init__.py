"""Adaptive SVD on an unmodified nanochat checkout: `python -m nanochat_patch --nanochat DIR -- <base_train flags>`.

options.py    what the command line may say
compat.py     what a checkout must have for this to work, found by looking, never by its version
patches.py    the four places that are wrapped
session.py    one training run: attach, step hooks, records, checkpoints
shield.py     gradients for the method that leave the host's own untouched
ranks.py      whether all ranks hold the same weights
sidecar.py    svd_*.pt beside nanochat's model_*.pt
records.py    a run directory that svd-monitor and svd-report read
weights.py    checkpoints and tokenizers from nanochat's form to ours and back
"""
