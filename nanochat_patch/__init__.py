"""Adaptive SVD on an unmodified nanochat checkout: `python -m nanochat_patch --nanochat DIR -- <base_train flags>`.

options.py    what the command line may say
compat.py     what a checkout must have for this to work, found by looking, never by its version
patches.py    the four places that are wrapped
mixers.py     state-space mixers in the place of attention
flat.py       many small parameters as one vector for nanochat's optimizer
session.py    one training run: attach, step hooks, records, checkpoints
wrapping.py   how a function is wrapped, and how a program is ended with one line
shield.py     gradients for the method that leave the host's own untouched
ranks.py      whether all ranks hold the same weights
sidecar.py    svd_*.pt beside nanochat's model_*.pt
records.py    a run directory that svd-monitor and svd-report read
gloo.py       nanochat's distributed optimizers without GPUs, for tests and the benchmark
weights.py    checkpoints and tokenizers from nanochat's form to ours and back
"""
