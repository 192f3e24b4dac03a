#!/bin/sh
# octavo beside llama.cpp and vLLM on a CPU in the shapes of several families, with random weights:
#
#     benchmarks/families.sh FOLDER --llama-bench PATH --vllm-python PATH --vllm-eager
#
# FOLDER keeps the models (8 GB) and is to hold nothing else. What follows it goes to run.py.
# SHAPES: some of benchmarks/shapes. Results: FOLDER/results/SHAPE.json, one file a shape.
set -eu

folder=${1:?expected the folder that keeps the models}
shift
here=$(dirname "$0")
mkdir -p "$folder/gguf" "$folder/results"
for shape in ${SHAPES:-qwen2.5-0.5b gemma-3-1b mixtral-1.5b-a0.5b}; do
  "${PYTHON:-python}" "$here/write_model.py" "$here/shapes/$shape" "$folder/$shape"
  "${PYTHON:-python}" "$here/run.py" "$here/specs/families.yaml" --model "$folder/$shape" \
    --folder "$folder/gguf" --output "$folder/results/$shape.json" "$@"
done
