"""Ours beside the peers: table.py OURS.jsonl PEERS.jsonl. A row per case and op; ratio is peer over ours, above 1 we are faster.

Both files come from one run on one machine; lines of other ranks, dtypes or routings are not compared. Exit code 1 if there is
nothing to show.
"""

import json
import sys

OPS = ["dispatch", "combine", "combine_weighted", "dispatch_bwd", "combine_bwd", "grouped_gemm", "moe_forward", "moe_backward"]


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file if line.startswith("{")]


def key(line):
    return line["case"], line["op"], line["ranks"], line["zipf"]


def ours_by_row(lines):
    return {key(line): line for line in lines if line["op"] in OPS and line.get("dtype") == "bf16"}


def row(ours, peer):
    cells = [f"{ours['case']:<10} {ours['op']:<17} {ours['ranks']:>5} {ours['zipf']:>4g}"]
    if "failed" in ours:
        return cells[0] + f"  ours failed: {ours['failed']}"
    share = f"{ours['link_fraction']:.2f}" if "link_fraction" in ours else "-"
    cells.append(f"{ours['median_us']:>10.1f} {share:>5}")
    if peer is None:
        return " ".join(cells) + f"  {'-':<22}"
    if "failed" in peer:
        return " ".join(cells) + f"  {peer['peer']:<22} did not run: {peer['failed']}"
    return " ".join(cells) + f"  {peer['peer']:<22} {peer['median_us']:>10.1f} {peer['median_us'] / ours['median_us']:>6.2f}"


def main(argv):
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    ours, peers = ours_by_row(read(argv[1])), read(argv[2])
    print(f"{'case':<10} {'op':<17} {'ranks':>5} {'zipf':>4} {'epd us':>10} {'link':>5}  {'peer':<22} {'peer us':>10} {'ratio':>6}")
    for where, line in ours.items():
        others = [peer for peer in peers if key(peer) == where]
        for peer in others or [None]:
            print(row(line, peer))
    return 0 if ours else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
