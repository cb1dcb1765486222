#!/bin/sh
# Every engine over every prepared model: run.sh WORK VENV-PEFT VENV-VLLM VENV-LLAMACPP VENV-MLX [CASE …]; the table goes to stdout.
set -e
here=$(dirname "$0")
work=$1 peft=$2 vllm=$3 llamacpp=$4 mlx=$5
shift 5
cases=${*:-$("$peft/bin/python" -c "import json, sys; print(*(c['key'] for c in json.load(open(sys.argv[1] + '/cases.json'))))" "$work")}
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
"$peft/bin/python" "$here/run_peft.py" "$work" $cases >&2
"$llamacpp/bin/python" "$here/run_llamacpp.py" "$work" $cases >&2
"$mlx/bin/python" "$here/run_mlx.py" "$work" $cases >&2
for case in $cases; do
    "$vllm/bin/python" "$here/run_vllm.py" "$work" "$case" >&2 || echo "$case: vLLM ended badly" >&2
done
"$peft/bin/python" "$here/table.py" "$work"
