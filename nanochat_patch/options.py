"""What the command line may say. Everything behind `--` is nanochat's own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from svdtrain.config import SVDConfig

ATTENTION = "attention"  # the mixer that nanochat has already
WITHOUT_EFFECT = (
    "on_alarm", "alarm_lr", "alarm_rank", "alarm_nats", "alarm_z", "alarm_patience", "interference_every",
    "replay_share", "reference_rows", "probe_rows",
)  # fmt: skip
"""Settings of the alarm and of what it is told by, which our own trainer has and nanochat's script does not."""
_DEFAULTS = dataclasses.asdict(SVDConfig())
RankCheck = Literal["off", "warn", "stop"]
Script = Literal["base_train", "mid_train", "chat_sft", "base_eval", "chat_eval", "chat_cli"]

DESCRIPTION = """Run nanochat's base_train unmodified, with adaptive SVD.

    python -m nanochat_patch --nanochat DIR [flags below] -- [flags of scripts/base_train.py, or what --script says]

Paths in nanochat's own flags are relative to DIR, where it runs."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where nanochat is and where records go."""

    nanochat: str = ""
    """Directory of the checkout."""
    script: Script = "base_train"
    """Its program to run. mid_train and chat_sft fine-tune with the method; base_eval, chat_eval and chat_cli are for
    models with mixers, which nanochat by itself cannot load."""
    run_dir: str = ""
    """Run directory for svd-monitor; default runs/nanochat-<date>-<time>. Give it again to go on after a resume."""
    rank_check: RankCheck = "warn"
    """Several GPUs: at each analysis compare all weights over the ranks and warn, or stop, when they differ."""


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What takes the place of attention."""

    mixer: str = ATTENTION
    """Sequence mixer of the blocks: attention, a name of ssm_blocks.available(), or MODULE:NAME for one of yours."""
    mixer_pattern: str = "M"
    """Blocks with the mixer (M) and with attention (A), tiled over the layers: MMMA is three to one."""

    def check(self) -> None:
        """Raises ValueError for a mixer that there is not, and for a pattern of other letters or without a mixer."""
        if not self.chosen:
            if self.mixer_pattern != "M":
                raise ValueError("--mixer-pattern says where a mixer goes: name one with --mixer")
            return
        from ssm_blocks.adapter import is_attention_layer  # here: these import torch
        from ssm_blocks.mixer import mixer_class

        mixer_class(self.mixer)
        is_attention_layer(self.mixer_pattern, 0)

    @property
    def chosen(self) -> bool:
        """Whether any layer may lose its attention."""
        return self.mixer != ATTENTION

    def layers(self, num_layers: int) -> list[int]:
        """Those of `num_layers` layers that get the mixer."""
        if not self.chosen:
            return []
        from ssm_blocks.adapter import is_attention_layer

        return [layer for layer in range(num_layers) if not is_attention_layer(self.mixer_pattern, layer)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """All settings of one launch."""

    launch: Launch = field(default_factory=Launch)
    svd: SVDConfig = field(default_factory=SVDConfig)
    mixer: MixerConfig = field(default_factory=MixerConfig)
    base_train: tuple[str, ...] = ()
    """Arguments for nanochat's script, untouched."""

    def __post_init__(self) -> None:
        if not self.launch.nanochat:
            raise ValueError("--nanochat DIR is missing: the directory of a nanochat checkout")
        self.mixer.check()
        if self.svd.svd_adapter == "reregister":
            raise ValueError(
                "--svd-adapter reregister cannot work here: nanochat's optimizer keeps one stacked state per shape, "
                "which another number of matrices breaks; leave it at auto"
            )
        if self.svd.svd_protect == "activation":
            raise ValueError(
                "--svd-protect activation needs the inputs of every layer on a reference set, which nanochat's script "
                "does not collect; use minor or core, or svdtrain's own trainer"
            )

        idle = [
            name
            for name in (f"svd_{n}" for n in WITHOUT_EFFECT)
            if getattr(self.svd, name) not in (_DEFAULTS[name], "none", 0)
        ]
        if idle:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise ValueError(
                f"{flags}: there is no alarm here, which needs first-seen text; use svdtrain's own trainer"
            )

    @property
    def checkout(self) -> Path:
        """Absolute directory of the checkout."""
        return Path(self.launch.nanochat).expanduser().resolve()

    @property
    def run_path(self) -> Path:
        """Absolute run directory; the same on every rank of a torchrun (only rank 0 writes)."""
        if self.launch.run_dir:
            return Path(self.launch.run_dir).expanduser().resolve()
        return Path("runs", f"nanochat-{time.strftime('%Y%m%d-%H%M%S')}").resolve()


def parse(argv: Sequence[str]) -> Options:
    """Flags before the first `--` are ours. Raises ValueError, in one line, for flags that cannot be read and for
    settings that cannot work; SystemExit for --help."""
    from svdtrain.config.flags import read_flags  # here, so that Options can be made without tyro

    ours, theirs = split(argv)
    groups = {"launch": Launch, "svd": SVDConfig, "mixer": MixerConfig}
    flags_class = dataclasses.make_dataclass(
        "Flags",
        [(name, kind, field(default_factory=kind)) for name, kind in groups.items()],
    )
    try:
        flags = read_flags(flags_class, ours, program="nanochat_patch", description=DESCRIPTION)
    except ValueError as error:
        if "--" not in argv and "Unrecognized" in str(error):
            raise ValueError(f"{error} (flags of nanochat's own script stand behind ` -- `)") from error
        raise
    return Options(launch=flags.launch, svd=flags.svd, mixer=flags.mixer, base_train=tuple(theirs))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and behind the first `--`."""
    arguments = list(argv)
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def is_main_process() -> bool:
    """Rank 0 of a torchrun, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0
