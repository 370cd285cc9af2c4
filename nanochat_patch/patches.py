"""The four places of nanochat that are wrapped: building the optimizer, saving, loading, logging. Mixers add theirs.

Must happen before scripts/base_train.py is imported, which takes the functions by name. The wrapped functions get
their arguments and give their results unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nanochat_patch import mixers
from nanochat_patch.compat import Surface, UnsupportedNanochat, find_mixer_surface
from nanochat_patch.session import Session
from nanochat_patch.sidecar import SidecarError
from nanochat_patch.wrapping import refuse, wrap


def install(surface: Surface, session: Session) -> None:
    """Wrap everything. Mixers come first: their wrapper of the optimizer's building lies inside the session's."""
    if session.options.mixer.chosen:
        mixers.install(find_mixer_surface(surface), session.options.mixer)
    wrap(surface.gpt, surface.setup_name, lambda original: _setup(original, surface.setup_name, session))
    wrap(surface.checkpoints, "save_checkpoint", lambda original: _save(original, session))
    wrap(surface.checkpoints, "load_checkpoint", lambda original: _load(original, session))
    wrap(surface.dummy_wandb, "log", lambda original: _log(original, session))
    wrap(surface.dummy_wandb, "finish", lambda original: _finish(original, session))
    wrap(surface.wandb, "init", lambda original: _init(original, session))


def _setup(original: Callable[..., Any], name: str, session: Session) -> Callable[..., Any]:
    def setup(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        try:
            session.optimizer_built(model, name, result)
        except (ValueError, UnsupportedNanochat) as error:
            refuse(error)
        return result

    return setup


def _save(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def save(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        # Ours first: a kill in between leaves a sidecar without a model, never a model without its sidecar.
        session.checkpoint_saved(given["checkpoint_dir"], given["step"])
        return original(*args, **kwargs)

    return save


def _load(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        result = original(*args, **kwargs)
        try:
            session.check_mixers(given["checkpoint_dir"], given["step"], result[0])
        except SidecarError as error:
            refuse(error)
        if given.get("load_optimizer", False):
            session.checkpoint_loaded(given["checkpoint_dir"], given["step"])
        return result

    return load


def _log(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    def log(self: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:
        session.records.log(data or {})
        return original(self, data, *args, **kwargs)

    return log


def _finish(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    def finish(self: Any, *args: Any, **kwargs: Any) -> Any:
        session.records.end("finished")
        return original(self, *args, **kwargs)

    return finish


def _init(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    def init(*args: Any, **kwargs: Any) -> Any:
        return MirroredRun(original(*args, **kwargs), session)

    return init


class MirroredRun:
    """A real wandb run whose log and finish are seen by us, too; everything else is the run's own."""

    def __init__(self, run: Any, session: Session) -> None:
        self._run, self._session = run, session

    def log(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """See wandb."""
        self._session.records.log(data)
        return self._run.log(data, *args, **kwargs)

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """See wandb."""
        self._session.records.end("finished")
        return self._run.finish(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)
