# What every job begins with; sourced. Override the three variables in your shell.
: "${OCTAVO_ENV:=$HOME/octavo-env}"
: "${OCTAVO_HOME:=$HOME/.cache/octavo}"
: "${OCTAVO_MODULES:=}"
export OCTAVO_HOME
# Nothing may go looking for a network on a compute node.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PIP_NO_INDEX=1

if [[ -n $OCTAVO_MODULES ]]; then
    # shellcheck disable=SC2086  # several names
    module load $OCTAVO_MODULES
fi
if [[ ! -x $OCTAVO_ENV/bin/python ]]; then
    echo "no Python environment in OCTAVO_ENV=$OCTAVO_ENV: slurm/README.md says how to make it" >&2
    exit 1
fi
export PATH="$OCTAVO_ENV/bin:$PATH" PYTHON="$OCTAVO_ENV/bin/python"
echo "job ${SLURM_JOB_ID:-none} on $(hostname), commit $(git rev-parse --short HEAD 2>/dev/null)"
