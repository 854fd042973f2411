#!/bin/bash
# Compiles the engine cublaslt_grouped against the headers of the newest cuBLAS that pip finds: build_grouped.sh SOURCE BUILD
# EPD_CUBLAS_WHEEL names a wheel that is there already; EPD_TEST_DOWNLOAD=1 lets pip fetch one (450 MB) into BUILD, once.
# Exit 77: no such wheel can be had, or no CUDA headers.
set -u
source=$1
folder=$2/cublas-wheel
cuda=${CUDA_HOME:-/usr/local/cuda}
wheel=${EPD_CUBLAS_WHEEL:-$(ls "$folder"/nvidia_cublas-*.whl 2>/dev/null | tail -1)}
skip() {
    echo "skipped: $1"
    exit 77
}
[ -f "$cuda/include/cuda_runtime_api.h" ] || skip "no CUDA headers in $cuda/include"
mkdir -p "$folder"
if [ ! -f "$wheel" ]; then
    [ "${EPD_TEST_DOWNLOAD:-0}" = 1 ] || skip "no wheel of nvidia-cublas; EPD_TEST_DOWNLOAD=1 fetches it (450 MB)"
    timeout 240 python3 -m pip download --quiet --no-deps --dest "$folder" nvidia-cublas >"$folder/pip.log" 2>&1 ||
        skip "pip cannot get nvidia-cublas: $(tail -1 "$folder/pip.log")"
    wheel=$(ls "$folder"/nvidia_cublas-*.whl | tail -1)
fi
python3 - "$wheel" "$folder/include" <<'PYTHON' || exit 1
import os, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if name.endswith(".h"):
            os.makedirs(sys.argv[2], exist_ok=True)
            with open(os.path.join(sys.argv[2], os.path.basename(name)), "wb") as out:
                out.write(wheel.read(name))
PYTHON
version=$(sed -n 's/^#define CUBLAS_VER_\(MAJOR\|MINOR\|PATCH\) //p' "$folder/include/cublas_api.h" | paste -sd.)
grep -q CUBLASLT_MATMUL_PREF_GROUPED_AVERAGE_REDUCTION_DIM "$folder/include/cublasLt.h" ||
    skip "cuBLAS $version has no grouped layouts"
for file in cublaslt_grouped cublaslt_check engine; do
    ${CC:-cc} -std=c11 -D_GNU_SOURCE -DEPD_CUBLASLT_GROUPED -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes \
        -Wmissing-prototypes -Wvla -O2 -I"$source" -isystem "$folder/include" -isystem "$cuda/include" \
        -c "$source/kernels/gemm/$file.c" -o "$folder/$file.o" || exit 1
done
nm "$folder/cublaslt_grouped.o" | grep -q ' w cublasLtGroupedMatrixLayoutCreate' || {
    echo "cublasLtGroupedMatrixLayoutCreate is not a weak symbol: an older library would not load"
    exit 1
}
echo "cublaslt_grouped compiles with the headers of cuBLAS $version"
