"""The standard cases, as client/bench/job.c has them: tokens of a rank, hidden, ffn, experts of all ranks, top-k."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


CASES = {
    case.name: case
    for case in (
        Case("dsv3", 4096, 7168, 2048, 256, 8),
        Case("qwen235b", 4096, 4096, 1536, 128, 8),
        Case("qwen30b", 8192, 2048, 768, 128, 8),
        Case("mixtral", 4096, 4096, 14336, 8, 2),
        Case("decode128", 128, 7168, 2048, 256, 8),
        Case("tiny", 256, 256, 512, 8, 2),
    )
}
