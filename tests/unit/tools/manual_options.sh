#!/bin/sh
# manual_options.sh PROGRAM MANUAL_FOLDER: fails if --help of the program names an option that its manual lacks, or the
# manual one that --help does not know. For epd the keys of the configuration file are compared with epd.conf(5) as well.
set -eu

program=$1
folder=$2
name=$(basename "$program")
page=$(ls "$folder/$name".[0-9].scd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A line that starts with --option defines it, in --help and (in bold) in the manual.
"$program" --help | sed -n 's/^ *\(-[a-zA-Z], \)\{0,1\}--\([a-z][a-z0-9-]*\).*/\2/p' | sort -u >"$work/help"
sed -n 's/^\*--\([a-z][a-z0-9-]*\)\*.*/\1/p; s/^\*-[a-zA-Z]\*, \*--\([a-z][a-z0-9-]*\)\*.*/\1/p' "$page" |
    sort -u >"$work/manual"

[ -s "$work/help" ] || {
    echo "no options found in $name --help" >&2
    exit 1
}
if ! diff -u "$work/help" "$work/manual" >"$work/diff"; then
    echo "$name --help and $(basename "$page") disagree (- only in --help, + only in the manual):" >&2
    cat "$work/diff" >&2
    exit 1
fi
echo "$(wc -l <"$work/help") options of $name are in its manual"

[ "$name" = epd ] || exit 0
# Every key of the file is a flag: epd.conf(5) must name it with '_' for '-'.
sed -n 's/^\*\([a-z][a-z0-9_]*\)\*.*/\1/p' "$folder/epd.conf.5.scd" | sort -u >"$work/keys"
# shellcheck disable=SC2013 # flags hold no blanks
for flag in $(grep -v -x -e config -e check-config -e version -e help "$work/help"); do
    key=$(echo "$flag" | tr - _)
    grep -q -x "$key" "$work/keys" || {
        echo "key $key is not in epd.conf.5.scd" >&2
        exit 1
    }
done
echo "every key is in epd.conf(5)"
