#!/bin/sh
# Makes a Python virtual environment: scripts/venv.sh DIRECTORY
#
# Takes $PYTHON, else the first Python >= 3.10 among python3, python3.14 ... python3.10, and says
# what to install where something that the build needs is missing. Does nothing when it is there.
set -eu

directory=$1
[ -x "$directory/bin/python" ] && "$directory/bin/python" -m pip --version >/dev/null 2>&1 && exit 0

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "octavo needs Python 3.10 or newer, and found none as \
${PYTHON:-python3}. Install one (Debian, Ubuntu: apt install python3 python3-venv python3-dev; \
macOS: brew install python), or name it: make PYTHON=/path/to/python3.12 ..."

"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || fail "$python cannot make virtual \
environments. On Debian and Ubuntu: apt install python3-venv"

"$python" - <<'CHECK' || fail "the header Python.h of $python is missing, which the build needs. \
On Debian and Ubuntu: apt install python3-dev; on Fedora: dnf install python3-devel"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
CHECK

found=
for compiler in ${CXX:-c++ g++ clang++}; do
    command -v "$compiler" >/dev/null 2>&1 && found=$compiler && break
done
[ -n "$found" ] || fail "no C++ compiler found (looked for ${CXX:-c++, g++, clang++}). \
Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; \
elsewhere: set CXX to a compiler that knows C++17"

echo "making $directory with $("$python" --version)"
"$python" -m venv --clear "$directory"
