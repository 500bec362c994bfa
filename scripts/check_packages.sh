#!/usr/bin/env bash
# Installs the project as an editable tree, a wheel and an sdist, each into a clean virtual environment, and tries it.
#
#   scripts/check_packages.sh PYTHON
#
# PYTHON is an interpreter whose environment has the dependencies and `build`: the clean environments borrow its packages
# through a .pth file instead of downloading them again. Builds are isolated, so they see neither torch nor this tree's
# environment.
set -euo pipefail

python=$(realpath -s "${1:?usage: scripts/check_packages.sh PYTHON}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

# A clean copy of what git would commit: stale build folders must not help.
tree=$scratch/tree
mkdir "$tree"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
done | tar --null --files-from=- -cf -) | tar -xf - -C "$tree"

clean_venv() { # NAME: makes an environment and prints its interpreter
    "$python" -m venv --without-pip "$scratch/$1"
    local bin=$scratch/$1/bin/python
    echo "$borrowed" > "$("$bin" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    echo "$bin"
}

try_out() { # NAME WHAT-TO-INSTALL...: installs and uses it from a directory that holds nothing of the project
    local name=$1 bin
    shift
    bin=$(clean_venv "$name")
    "$python" -m pip --python "$bin" install --quiet --no-deps --ignore-installed "$@"
    mkdir -p "$scratch/empty"
    (cd "$scratch/empty" && "$bin" "$root/scripts/try_installed.py" "$name" "$scratch/checkpoint")
}

"$python" "$root"/benchmarks/peers/make_*.py --preset tiny --config-only --corpus-mb 0.1 --out "$scratch/checkpoint" >/dev/null

"$python" -m build --quiet --outdir "$scratch/dist" --wheel "$tree"
"$python" -m build --quiet --outdir "$scratch/dist" --sdist "$tree"
"$python" "$root/scripts/list_package.py" "$scratch"/dist/*.whl "$scratch"/dist/*.tar.gz

try_out editable --editable "$tree"
try_out wheel "$scratch"/dist/*.whl
try_out sdist "$scratch"/dist/*.tar.gz
