#!/bin/bash
# One row per setting, one column per case, TFLOP/s: tune.sh FOLDER OP CASES REPEATS "ENV=.. ENV=.." ...
folder=$1 op=$2 cases=$3 repeats=$4
shift 4
cublas=$(dirname "$(find / -name 'libcublasLt.so.13' -not -path '/proc/*' 2>/dev/null | head -1)")
export LD_LIBRARY_PATH=$cublas:${LD_LIBRARY_PATH:-}
for setting in "$@"; do
    printf '%-40s' "$op $setting"
    env $setting timeout 100 "$folder/gemm_bench" sm90 "$op" "$cases" "$repeats" |
        sed 's/.*"case": "\([^"]*\)".*"tflops": \([0-9.]*\).*/\1 \2/' | tr '\n' '|'
    echo
done
