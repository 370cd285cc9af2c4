"""`python fp8_inside.py DIRECTORY` in a real checkout that has fp8: its layers are told, watched, not switched."""

import sys
from pathlib import Path

from real_mixers import build, surface_here

from nanochat_patch.compat import uses_fp8
from nanochat_patch.options import Launch, Options
from nanochat_patch.session import Session
from svdtrain.config import SVDConfig


def main() -> None:
    surface = surface_here()
    from nanochat.fp8 import (  # type: ignore[import-not-found]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    model = build(n_layer=2, n_embd=64)
    assert not uses_fp8(model)
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    assert uses_fp8(model)
    for switching in (True, False):
        where = Launch(nanochat=str(Path.cwd()), run_dir=f"{sys.argv[1]}/{switching}")
        session = Session(Options(launch=where, svd=SVDConfig(svd_switching=switching)))
        try:
            session.optimizer_built(model, surface.setup_name, getattr(model, surface.setup_name)())
        except ValueError as error:
            assert switching
            print(f"refused: {error}")
        else:
            assert not switching
            assert session.svd is not None
            print(f"watched: {len(session.svd.targets)}")


if __name__ == "__main__":
    main()
