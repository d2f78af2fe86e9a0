# Sourced, not run. Sets $PYTHON to an interpreter that has the needed packages:
# the active one if it has them, else .venv, which is made from requirements.txt on first use.

needed="torch transformers tokenizers safetensors numpy pandas scipy matplotlib pydantic yaml tqdm zstandard pytest pytest_cov"

has_packages() {
    "$1" - $needed <<'PY' 2>/dev/null
import importlib.util, sys
sys.exit(sys.version_info < (3, 10) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PY
}

make_environment() {
    base=$(command -v python3 || command -v python) || { echo "found no python3 on the PATH, expected Python 3.10 or newer" >&2; return 2; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$base is $("$base" --version 2>&1), expected Python 3.10 or newer; put a newer one on the PATH" >&2
        return 2
    }
    echo "making .venv and installing requirements.txt (once, a few minutes)"
    "$base" -m venv .venv && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || {
        echo "the installation failed; see the message above, then run the same command again" >&2
        return 1
    }
}

choose_python() {
    active=$(command -v python || command -v python3 || true)
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -n "$active" ] && has_packages "$active"; then
        PYTHON=$active
        return
    fi
    if ! { [ -x .venv/bin/python ] && has_packages .venv/bin/python; }; then
        if [ -n "$active" ] && has_packages "$active"; then
            PYTHON=$active
            return
        fi
        make_environment || return
    fi
    PYTHON=.venv/bin/python
}
