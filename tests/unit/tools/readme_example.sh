#!/bin/sh
# readme_example.sh README EXAMPLE: fails unless the C program that the README shows is the example's, but for blanks.
set -eu

plain() {
    tr -d ' \t\n'
}

shown=$(sed -n '/^```c$/,/^```$/p' "$1" | sed -n '/^int main(void)/,/^}/p' | plain)
example=$(sed -n '/^int main(void)/,/^}/p' "$2" | plain)
[ -n "$shown" ] || {
    echo "$1 shows no C program" >&2
    exit 1
}
[ "$shown" = "$example" ] || {
    echo "the program in $1 is not the one in $2" >&2
    exit 1
}
