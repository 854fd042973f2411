"""Trains a tiny byte-level language model with one MoE layer on several rank processes and numpy alone.

The experts run through epd on the host backend: each rank owns n_experts / ranks of them, and one moe_forward and one
moe_backward plan move the tokens there and back. Everything else (embeddings, router, unembedding, Adam) is plain numpy and
replicated; the ranks sum its gradients through shared memory between two barriers of epd. The same model is then trained in
one process with plain numpy experts on the same data, and the losses of every step must agree.

    epd --backend host --devices 2 &
    python3 client/examples/train_moe_numpy.py --ranks 2 --steps 40

Needs the package epd (client/python) on the path. The text it learns is this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, MutableSequence
from multiprocessing import shared_memory

import epd
import numpy as np

VOCABULARY, HIDDEN, FFN, EXPERTS, TOP_K, TOKENS = 128, 32, 48, 8, 2, 96
LEARNING_RATE = 5e-3
TOLERANCE = 1e-4  # of the loss of a step, relative

Params = dict[str, np.ndarray]
# (x, topk_idx, topk_weights) -> out and its backward: dout -> (dx, d_weights, gradients of w1 and w2)
Backward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, Params]]
Experts = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, Backward]]


def initial_params(seed: int) -> Params:
    """All parameters of the model; a rank keeps its slice of w1 and w2."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {
        "previous": normal(VOCABULARY, HIDDEN),
        "current": normal(VOCABULARY, HIDDEN),
        "router": normal(EXPERTS, HIDDEN),
        "unembed": normal(VOCABULARY, HIDDEN),
        "w1": normal(EXPERTS, 2 * FFN, HIDDEN),
        "w2": normal(EXPERTS, HIDDEN, FFN),
    }


def batch(step: int, rank: int, ranks: int) -> np.ndarray:
    """[TOKENS, 3]: the byte before, this byte, the byte to predict."""
    text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8) % VOCABULARY
    starts = np.random.default_rng((step, rank, ranks)).integers(0, len(text) - 2, TOKENS)
    return text[starts[:, None] + np.arange(3)].astype(np.int64)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def step_gradients(params: Params, data: np.ndarray, n_all: int, experts: Experts) -> tuple[float, Params]:
    """Loss and gradients of one rank's tokens, both divided by the tokens of all ranks."""
    before, now, target = data.T
    rows = np.arange(len(data))
    x = params["previous"][before] + params["current"][now]
    scores = x @ params["router"].T
    topk_idx = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
    topk_weights = softmax(np.take_along_axis(scores, topk_idx, axis=1))
    layer, layer_backward = experts(x, topk_idx, topk_weights)
    z = x + layer
    probability = softmax(z @ params["unembed"].T)
    loss = float(-np.log(probability[rows, target]).sum() / n_all)

    d_logits = probability
    d_logits[rows, target] -= 1
    d_logits /= n_all
    dz = d_logits @ params["unembed"]
    dx_layer, d_weights, grads = layer_backward(dz)
    d_topk = topk_weights * (d_weights - (d_weights * topk_weights).sum(axis=1, keepdims=True))
    d_scores = np.zeros_like(scores)
    np.put_along_axis(d_scores, topk_idx, d_topk, axis=1)
    dx = dz + dx_layer + d_scores @ params["router"]
    grads |= {"unembed": d_logits.T @ z, "router": d_scores.T @ x}
    for name, index in (("previous", before), ("current", now)):
        grads[name] = np.zeros_like(params[name])
        np.add.at(grads[name], index, dx)
    return loss, grads


@dataclasses.dataclass
class Adam:
    """Adam over arrays that it updates in place."""

    params: Params
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    step: int = 0

    def update(self, grads: Params) -> None:
        self.step += 1
        for name, grad in grads.items():
            m, v = self.moments.setdefault(name, (np.zeros_like(grad), np.zeros_like(grad)))
            m += 0.1 * (grad - m)
            v += 0.01 * (grad * grad - v)
            m_hat, v_hat = m / (1 - 0.9**self.step), v / (1 - 0.99**self.step)
            self.params[name] -= (LEARNING_RATE * m_hat / (np.sqrt(v_hat) + 1e-6)).astype(np.float32)


# ---- experts through epd ----


def epd_experts(group: epd.Group, params: Params) -> Experts:
    """The layer through two plans. Moves params' slices of w1 and w2 into memory of the daemon, where Adam updates them."""
    first, n_local = group.info.first_expert, group.info.n_local_experts
    for name in ("w1", "w2"):
        mine = group.alloc((n_local, *params[name].shape[1:]))
        mine[...] = params[name][first : first + n_local]
        params[name] = mine
    x, out, dout, dx = (group.alloc((TOKENS, HIDDEN)) for _ in range(4))
    topk_weights, d_weights = (group.alloc((TOKENS, TOP_K)) for _ in range(2))
    topk_idx = group.alloc((TOKENS, TOP_K), "i64")
    dw1, dw2 = group.alloc(params["w1"].shape), group.alloc(params["w2"].shape)
    forward = group.moe_forward(
        x=x, topk_idx=topk_idx, topk_weights=topk_weights, w1=params["w1"], w2=params["w2"], out=out, saved="context"
    )
    backward = group.moe_backward(forward, dout=dout, dx=dx, d_weights=d_weights, dw1=dw1, dw2=dw2)

    def run(x_now: np.ndarray, idx_now: np.ndarray, weights_now: np.ndarray) -> tuple[np.ndarray, Backward]:
        x[...], topk_idx[...], topk_weights[...] = x_now, idx_now, weights_now
        forward()

        def run_backward(dout_now: np.ndarray) -> tuple[np.ndarray, np.ndarray, Params]:
            dout[...] = dout_now
            backward()
            return dx, d_weights, {"w1": dw1, "w2": dw2}

        return out, run_backward

    return run


class SharedSum:
    """Sums the replicated gradients and the loss of all ranks: everybody writes a row, a barrier, everybody adds the rows."""

    def __init__(self, memory: shared_memory.SharedMemory, group: epd.Group) -> None:
        ranks = group.info.world_size
        self.rows = np.ndarray((ranks, memory.size // 4 // ranks), np.float32, memory.buf)
        self.rank = group.info.rank
        self.barrier = group.barrier()

    def __call__(self, loss: float, grads: Params) -> tuple[float, Params]:
        flat = np.concatenate([[loss], *(grad.ravel() for grad in grads.values())])
        self.rows[self.rank, : len(flat)] = flat
        self.barrier()
        total = self.rows[:, : len(flat)].sum(axis=0)
        self.barrier()  # nobody writes the next row before everybody has read this one
        summed, at = {}, 1
        for name, grad in grads.items():
            summed[name] = total[at : at + grad.size].reshape(grad.shape)
            at += grad.size
        return float(total[0]), summed


def run_rank(rank: int, args: argparse.Namespace, memory_name: str, losses: MutableSequence[float]) -> None:
    """One rank process. Rank 0 writes the loss of every step, of all ranks, into losses."""
    memory = shared_memory.SharedMemory(memory_name)
    sizes = dict(n_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, ffn=FFN, max_tokens=TOKENS)
    with epd.connect(args.socket) as client, client.join(args.group, args.ranks, rank, **sizes) as group:
        params = initial_params(args.seed)
        experts = epd_experts(group, params)
        shared_sum, adam = SharedSum(memory, group), Adam(params)
        for step in range(args.steps):
            loss, grads = step_gradients(params, batch(step, rank, args.ranks), TOKENS * args.ranks, experts)
            local = {name: grads.pop(name) for name in ("w1", "w2")}
            loss, summed = shared_sum(loss, grads)
            adam.update(summed | local)
            if rank == 0:
                losses[step] = loss
        shared_sum.barrier()  # a rank that leaves early would be lost to one that is still at work
        del shared_sum
    memory.close()


def train_through_epd(args: argparse.Namespace) -> list[float]:
    """Starts the ranks and returns the losses; raises if one of them fails."""
    context = multiprocessing.get_context("spawn")
    n_floats = 1 + sum(array.size for name, array in initial_params(args.seed).items() if name not in ("w1", "w2"))
    memory = shared_memory.SharedMemory(create=True, size=4 * n_floats * args.ranks)
    losses = context.Array("d", args.steps, lock=False)
    ranks = [context.Process(target=run_rank, args=(rank, args, memory.name, losses)) for rank in range(args.ranks)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    finally:
        memory.close()
        memory.unlink()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    if failed:
        raise SystemExit(f"ranks {failed} failed")
    return list(losses)


# ---- reference ----


def numpy_experts(params: Params) -> Experts:
    """The layer from its definition, expert after expert."""

    def run(x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray) -> tuple[np.ndarray, Backward]:
        out, kept = np.zeros_like(x), []
        for expert in range(EXPERTS):
            token, k = np.nonzero(topk_idx == expert)
            gate, up = np.split(x[token] @ params["w1"][expert].T, 2, axis=1)
            sigmoid = 1 / (1 + np.exp(-gate))
            act = gate * sigmoid * up
            y = act @ params["w2"][expert].T
            np.add.at(out, token, topk_weights[token, k, None] * y)
            kept.append((token, k, gate, up, sigmoid, act, y))

        def run_backward(dout: np.ndarray) -> tuple[np.ndarray, np.ndarray, Params]:
            dx, d_weights = np.zeros_like(x), np.zeros_like(topk_weights)
            grads = {name: np.zeros_like(params[name]) for name in ("w1", "w2")}
            for expert, (token, k, gate, up, sigmoid, act, y) in enumerate(kept):
                d_weights[token, k] = (dout[token] * y).sum(axis=1)
                dy = topk_weights[token, k, None] * dout[token]
                d_act = dy @ params["w2"][expert]
                d_gate = d_act * up * sigmoid * (1 + gate * (1 - sigmoid))
                d_preact = np.concatenate([d_gate, d_act * gate * sigmoid], axis=1)
                grads["w2"][expert] = dy.T @ act
                grads["w1"][expert] = d_preact.T @ x[token]
                np.add.at(dx, token, d_preact @ params["w1"][expert])
            return dx, d_weights, grads

        return out, run_backward

    return run


def train_reference(args: argparse.Namespace) -> list[float]:
    """The same training in this process, without epd."""
    params = initial_params(args.seed)
    experts, adam, history = numpy_experts(params), Adam(params), []
    for step in range(args.steps):
        data = np.concatenate([batch(step, rank, args.ranks) for rank in range(args.ranks)])
        loss, grads = step_gradients(params, data, len(data), experts)
        adam.update(grads)
        history.append(loss)
    return history


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--socket", help="of the daemon (default: EPD_SOCKET, else the runtime directory)")
    parser.add_argument("--group", default="train_moe_numpy", help="the name under which the ranks meet")
    args = parser.parse_args()
    losses, reference = train_through_epd(args), train_reference(args)
    difference = np.abs(np.array(losses) / np.array(reference) - 1)
    for step in range(0, args.steps, max(1, args.steps // 8)):
        print(f"step {step:4d}  loss {losses[step]:.5f}  reference {reference[step]:.5f}  difference {difference[step]:.1e}")
    print(f"last loss {losses[-1]:.5f} of {losses[0]:.5f}, largest relative difference {difference.max():.1e}")
    if difference.max() > TOLERANCE:
        print(f"the losses differ by more than {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
