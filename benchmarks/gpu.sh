#!/usr/bin/env bash
# Build, test and measure octavo on a machine with an NVIDIA GPU.
#
#   benchmarks/gpu.sh lease               all that matters, within 560 seconds
#   benchmarks/gpu.sh lease-2             variants and peers, within 560 seconds
#   benchmarks/gpu.sh                     every step, without a limit for all together
#   benchmarks/gpu.sh build tests decode  these steps
#   benchmarks/gpu.sh lease --emulate     the same with tiny shapes on the emulated GPU (no figures)
#
# Needs nvcc (CUDA 12.4 or newer), CMake, ninja, and in the Python that $PYTHON names (python3)
# nanobind 3, NumPy, hypothesis and pytest with xdist and timeout; takes torch, transformers, ncu and
# compute-sanitizer where they are. Wheels in $WHEELS (build/wheels) are used in place of what the
# machine has. Fetches nothing. Results go to $OUT (build/gpu): benchmarks/README.md.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benchmarks/gpu/lease.py "$@"
