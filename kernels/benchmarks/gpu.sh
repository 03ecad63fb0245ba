#!/usr/bin/env bash
# All that wants a GPU, in four parts of at most ten minutes: gpu.sh 1|2|3|4 OUT
#   1  sanitizers, then correctness of every form against the reference in float64
#   2  the benchmark against flash-linear-attention, then tuning
#   3  whole models against transformers, then four layouts trained on retrieval
#   4  vLLM, where it is installed: tokens, no waiting in a decode step, tokens a second
# From the root of the repository; wheels of what is missing in .whl/ are used where they lie.
# A part does all of its sections, whatever fails, and prints in the end what did.
set -u
part=$1 out=$2
mkdir -p "$out"
export PYTHONPATH=.:kernels:eval PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    # Behind what the machine has: only what is missing comes from there.
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    PYTHONPATH+=:$site
fi
failed=()

section() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    timeout -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n 25 "$out/$name.log"
    echo "== $name: status $status after $((SECONDS - start)) s =="
    ((status == 0)) || failed+=("$name ($status)")
}

check() {  # NAME SECONDS BUDGET ARGUMENTS...
    local name=$1 seconds=$2 budget=$3
    shift 3
    section "$name" "$seconds" python3 kernels/benchmarks/gpu_check.py "$name" --out "$out" --budget "$budget" "$@"
}

case $part in
1)
    check correctness 300 260 --jobs 12
    section sanitize 260 python3 kernels/benchmarks/gpu_check.py sanitize
    ;;
2)
    check bench 385 360 --jobs 8
    check tune 195 175 --jobs 12
    ;;
3)
    section model 280 python3 -m hybrid.train.gpu_benchmark --out "$out"
    section retrieval 300 python3 -m hybrid.cli ablate configs/ablations/retrieval.yaml "seeds=[0]" "out=$out/retrieval"
    find "$out/retrieval" -maxdepth 1 -type f -exec cp {} "$out/" \; 2>/dev/null
    rm -rf "$out/retrieval"
    ;;
4)
    section serve 280 python3 kernels/benchmarks/serving.py
    section serve_bf16 200 python3 kernels/benchmarks/serving.py --dtype bfloat16
    ;;
*)
    echo "part 1, 2, 3 or 4, not $part" >&2
    exit 2
    ;;
esac
echo "failed: ${failed[*]:-nothing}"
((${#failed[@]} == 0))
