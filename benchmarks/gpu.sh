#!/usr/bin/env bash
# Build, test and measure octavo on a machine with an NVIDIA GPU, in stages of under ten minutes.
#
#   benchmarks/gpu.sh                     every stage that has no result for this commit yet
#   benchmarks/gpu.sh build test          these stages, again
#   benchmarks/gpu.sh --list              what there is
#
# Needs nvcc (CUDA 12.4 or newer), CMake, scikit-build-core, nanobind, NumPy, pytest, torch and
# transformers in the Python that $PYTHON names (python3); fetches nothing. Figures go to
# benchmarks/results/gpu-NAME.json, one file a GPU; the table comes last. No stage is measured
# before `build` and `test` have passed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
logs=${LOGS:-build/gpu}
marks=$logs/done-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
mkdir -p "$marks"
export OCTAVO_TEST_CUDA_DEVICE=cuda PYTHONUNBUFFERED=1

stages=(build test diff sanitizer limits decode decode-int8 decode-int4 kernels prefill batch mixed
        huggingface deterministic)

run_stage() {
    case $1 in
    build)
        "$python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall . \
            --config-settings=cmake.define.OCTAVO_CUDA=ON \
            "--config-settings=build-dir=build/gpu-build" &&
            "$python" -c 'from octavo import _native; print(_native.build_info())'
        ;;
    test) "$python" -m pytest -q -x tests/test_cuda_*.py ;;
    diff) "$python" -m pytest -q tests/hf/test_cuda_hf.py ;;
    sanitizer)
        if ! command -v compute-sanitizer >/dev/null; then
            echo "compute-sanitizer is not here: skipped"
            return 0
        fi
        # One tool after the other over a few small cases of every op.
        for tool in memcheck racecheck initcheck; do
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$python" -m pytest -q -x -k "tap or replayed" tests/test_cuda_runtime.py || return 1
        done
        ;;
    limits) "$python" benchmarks/gpu/limits.py ;;
    kernels) "$python" benchmarks/gpu/kernels.py ;;
    decode) "$python" benchmarks/gpu/model.py decode --format bf16 ;;
    decode-int8) "$python" benchmarks/gpu/model.py decode --format int8 ;;
    decode-int4) "$python" benchmarks/gpu/model.py decode --format int4 ;;
    prefill)
        "$python" benchmarks/gpu/model.py prefill --format bf16 &&
            "$python" benchmarks/gpu/model.py prefill --format int8
        ;;
    batch)
        "$python" benchmarks/gpu/model.py batch --format bf16 &&
            "$python" benchmarks/gpu/model.py batch --format int8
        ;;
    mixed)
        "$python" benchmarks/gpu/mixed.py &&
            "$python" benchmarks/gpu/mixed.py --kv-dtype int8 &&
            "$python" benchmarks/gpu/mixed.py --format int8 --kv-dtype int8
        ;;
    huggingface) "$python" benchmarks/gpu/huggingface.py ;;
    deterministic)
        "$python" benchmarks/gpu/model.py batch --deterministic &&
            "$python" benchmarks/gpu/model.py decode --enforce-eager
        ;;
    *)
        echo "there is no stage \"$1\"; expected one of: ${stages[*]}" >&2
        return 2
        ;;
    esac
}

if [[ ${1:-} == --list ]]; then
    printf '%s\n' "${stages[@]}"
    exit 0
fi
again=0
if (($#)); then
    again=1
    stages=("$@")
fi

failed=()
for stage in "${stages[@]}"; do
    if ((!again)) && [[ -e $marks/$stage ]]; then continue; fi
    printf '==== %s\n' "$stage"
    start=$SECONDS
    timeout 590 bash -c "$(declare -f run_stage); python=$python; stages=(); run_stage $stage" \
        2>&1 | tee "$logs/$stage.log"
    status=${PIPESTATUS[0]}
    printf '==== %s: %s after %d s\n' "$stage" "$( ((status)) && echo "FAILED ($status)" || echo ok)" \
        $((SECONDS - start))
    if ((status)); then
        failed+=("$stage")
        # A wrong result must not be measured.
        if [[ $stage == build || $stage == test ]]; then break; fi
    else
        touch "$marks/$stage"
    fi
done

printf '\n'
"$python" benchmarks/gpu/table.py
((${#failed[@]} == 0)) || printf 'FAILED: %s\n' "${failed[*]}"
((${#failed[@]} == 0))
