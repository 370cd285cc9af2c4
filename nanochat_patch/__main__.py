"""`python -m nanochat_patch --nanochat DIR [--svd-... flags] -- <base_train flags>`, also under torchrun."""

import sys

from nanochat_patch.compat import UnsupportedNanochat
from nanochat_patch.options import parse
from nanochat_patch.wrapping import refuse


def main() -> None:
    """Entry point."""
    from nanochat_patch.launch import prepare, run_script

    try:
        session = prepare(parse(sys.argv[1:]))
    except (ValueError, UnsupportedNanochat) as error:
        refuse(error)
    run_script(session)


if __name__ == "__main__":
    main()
