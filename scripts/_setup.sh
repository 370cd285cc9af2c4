# Sourced by the other scripts: makes .venv in the repository and installs svdtrain into it, with the extras that the
# script names: setup_environment, or setup_environment test. Nothing is done if that happened before and neither
# pyproject.toml nor constraints.txt changed since.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

setup_environment() {
    local extras="${1:-}" python="${PYTHON:-python3}" stamp wanted package
    stamp=".venv/.installed${extras:+-$extras}"
    package=".${extras:+[$extras]}"
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "svdtrain needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2
        return 1
    }
    echo "setting up .venv (once; torch is large, this can take a few minutes)"
    if command -v uv >/dev/null 2>&1; then
        [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv || return 1
        uv pip install --quiet --python .venv/bin/python -c constraints.txt -e "$package" || return 1
    else
        [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
        .venv/bin/python -m pip install --quiet -c constraints.txt -e "$package" || return 1
    fi
    echo "$wanted" >"$stamp"
}
