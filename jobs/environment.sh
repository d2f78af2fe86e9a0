# shellcheck shell=bash disable=SC2034
# Sourced, not run. Sets $PYTHON to an interpreter that has the needed packages:
# the active one if it has them, else .venv, which is made from requirements.txt on first use.

# Threads that spin while they wait take the cores from each other wherever a machine is shared.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

needed="torch>=2.9 transformers>=5.0 tokenizers>=0.22 safetensors>=0.5 huggingface-hub>=1.31 numpy>=2.0 pandas>=2.2 scipy>=1.15
matplotlib>=3.9 pydantic>=2.10 PyYAML>=6.0 tqdm>=4.60 zstandard>=0.22 tiktoken>=0.9 pyarrow>=16.0 Jinja2>=3.1
pytest>=8.0 pytest-cov>=5.0 pytest-rerunfailures>=14.0 pytest-xdist>=3.6"

has_packages() {
    # shellcheck disable=SC2086 # one argument a package
    "$1" - $needed <<'PY' 2>/dev/null
import sys
from importlib import metadata

def have(requirement):
    name, least = requirement.split(">=")
    found = metadata.version(name).split(".")[:2]
    return [int(part) for part in found] >= [int(part) for part in least.split(".")]

try:
    sys.exit(sys.version_info < (3, 10) or not all(have(requirement) for requirement in sys.argv[1:]))
except (metadata.PackageNotFoundError, ValueError):
    sys.exit(1)
PY
}

make_environment() {
    base=$(command -v python3 || command -v python) || { echo "found no python3 on the PATH, expected Python 3.10 or newer" >&2; return 2; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$base is $("$base" --version 2>&1), expected Python 3.10 or newer; put a newer one on the PATH" >&2
        return 2
    }
    echo "making .venv and installing requirements.txt (once, a few minutes)"
    if ! { "$base" -m venv .venv && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; }; then
        echo "the installation failed; see the message above, then run the same command again" >&2
        return 1
    fi
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
