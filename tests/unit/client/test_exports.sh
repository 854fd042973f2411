#!/bin/sh
# test_exports.sh NM LIBRARY HEADER: the library exports exactly the functions that the public header declares.
set -eu
exported=$("$1" -D --defined-only "$2" | awk '{print $3}' | sed 's/@.*//' | sort)
declared=$(grep -Eo '\bepd_[a-z_]+\(' "$3" | tr -d '(' | sort -u)
if [ "$exported" != "$declared" ]; then
    printf 'exported:\n%s\n\ndeclared:\n%s\n' "$exported" "$declared" >&2
    exit 1
fi
