"""Run nanochat's script, unmodified, in this process."""

from __future__ import annotations

import os
import runpy
import sys

from nanochat_patch.compat import UnsupportedNanochat, enter_checkout, find_surface
from nanochat_patch.options import Options
from nanochat_patch.patches import install
from nanochat_patch.session import Session


def prepare(options: Options) -> Session:
    """Enter the checkout and wrap what is wrapped. Raises UnsupportedNanochat."""
    # Before the directory changes: paths are relative to where the user is.
    checkout, session = options.checkout, Session(options)
    if not checkout.is_dir():
        raise UnsupportedNanochat(f"--nanochat {checkout}: no such directory")
    os.chdir(checkout)
    enter_checkout(checkout, options.launch.script)
    install(find_surface(), session)
    return session


def run_script(session: Session) -> None:
    """Its script as `__main__`; whatever ends it is told to the records and passed on."""
    script = session.options.launch.script
    sys.argv = [f"scripts/{script}.py", *session.options.base_train]
    try:
        runpy.run_module(f"scripts.{script}", run_name="__main__", alter_sys=True)
    except BaseException as error:
        session.records.end(f"exception: {type(error).__name__}: {error}")
        raise
    session.records.end("finished")
