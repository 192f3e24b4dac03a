#!/bin/sh
# Runs Python tests that drive the sanitized native module: scripts/asan_pytest.sh PYTHON [ARGS]
#
# Python is not instrumented, so the sanitizer's library has to be loaded before it. libstdc++ goes
# with it, since the sanitizer looks up the C++ exception functions when it starts. Leaks are not
# counted: the interpreter keeps much of what it allocates until the process ends.
set -eu

python=$1
shift

compiler=${CXX:-c++}
libraries=
for library in libasan.so libstdc++.so; do
    path=$("$compiler" -print-file-name=$library)
    case $path in
        /*) libraries="$libraries $path" ;;
        *)
            echo "error: $compiler has no $library, which these tests load before Python." \
                "Use GCC with its sanitizers: make asan CXX=g++" >&2
            exit 1
            ;;
    esac
done

# The tests that reach native code with odd shapes, bad arguments and damaged files. Those of whole
# engines run the same kernels with fewer shapes, and take long.
files=
for file in tests/ops/test_ops*.py tests/engine/test_runtime*.py \
    tests/engine/test_adapters_native.py tests/ops/test_cuda*.py tests/engine/test_cuda_runtime.py \
    tests/engine/test_cuda_steps.py tests/*/test_*fuzz*.py; do
    [ -e "$file" ] && files="$files $file"
done

# --capture=sys: the sanitizer writes its report to file descriptor 2 and ends the process, so a
# report that pytest had caught there would be lost with it.
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc
# Planted mistakes, "an error would be found": the same native code once more.
# shellcheck disable=SC2086 # word splitting is meant
LD_PRELOAD="${libraries# }" "$python" -m pytest --timeout=600 --capture=sys -k 'not planted and not would_be' \
    $files "$@"
