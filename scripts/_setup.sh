# Sourced by the other scripts: makes .venv in the repository and installs svdtrain with its test tools into it.
# Nothing is done if that happened before and neither pyproject.toml nor constraints.txt changed since.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

setup_environment() {
    local python="${PYTHON:-python3}" stamp=".venv/.installed" wanted
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
        uv venv --quiet --python "$python" .venv && uv pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[test]"
    else
        "$python" -m venv .venv && .venv/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
    fi || return 1
    echo "$wanted" >"$stamp"
}
