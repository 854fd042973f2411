"""Trains a small byte-level MoE transformer on a real text; the experts run through epd, the rest is plain PyTorch.

    epd --socket /run/user/1000/epd/epd.sock &
    torchrun --nproc-per-node 4 client/examples/train_moe.py --steps 200 --reference --plot training.png

Every rank is a data-parallel replica of the transformer and owns its share of each layer's experts. With --reference the same
training runs once more in the same processes with the experts in plain PyTorch (all_to_all_single and one matrix product per
expert), and the losses of all steps have to agree. Both step times are printed; --plot saves losses and step times as a
picture, for which matplotlib has to be there. --kill-rank makes a rank kill itself at --kill-step: the others are told by an
epd.PeerLost that names it, and go on to save what they have.

Expert weights are bf16 (f32 on the host backend) with an f32 copy that the optimizer updates; their gradients go straight
into its f32 buffers (main_grad). Needs the package epd (client/python) on the path.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import signal
import statistics
import sys
import time

import epd
import epd.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    ffn: int
    experts: int
    top_k: int
    length: int  # of a sequence
    batch: int  # sequences of a rank and step


# ---- experts ----


class EpdExperts(nn.Module):
    """The experts of this rank through epd."""

    def __init__(self, group: epd.torch.Group) -> None:
        super().__init__()
        self.moe = epd.torch.MoE(group)
        for weight in self.moe.parameters():
            weight.main_grad = group.empty(weight.shape, torch.float32).zero_()

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.moe.w1, self.moe.w2

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.moe(x, idx, weights)


class Exchange(torch.autograd.Function):
    """Rows to the ranks of their experts, and their gradients back."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.splits = sent, received
        return exchange(rows, sent, received)

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.splits
        return exchange(grad, received, sent), None, None


def exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    if dist.get_backend() == "nccl":
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out
    mine = dist.get_rank()  # gloo
    sources, targets = list(rows.contiguous().split(sent)), list(out.split(received))
    targets[mine].copy_(sources[mine])
    others = [r for r in range(dist.get_world_size()) if r != mine]
    pending = [dist.isend(sources[r], r) for r in others if sent[r]] + [
        dist.irecv(targets[r], r) for r in others if received[r]
    ]
    for work in pending:
        work.wait()
    return out


class PlainExperts(nn.Module):
    """The same experts of PyTorch's own parts."""

    def __init__(self, n_local: int, hidden: int, ffn: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_local, 2 * ffn, hidden, dtype=dtype, device=device))
        self.w2 = nn.Parameter(torch.empty(n_local, hidden, ffn, dtype=dtype, device=device))

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.w1, self.w2

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        world, n_local, top_k = dist.get_world_size(), len(self.w1), idx.shape[1]
        order = idx.flatten().argsort(stable=True)
        counts = torch.bincount(idx.flatten(), minlength=world * n_local).view(world, n_local)
        theirs = exchange(counts, [1] * world, [1] * world)
        splits = [table.sum(1).tolist() for table in (counts, theirs)]
        rows = Exchange.apply(x[order // top_k], *splits)
        expert = torch.arange(n_local, device=x.device).repeat(world).repeat_interleave(theirs.flatten())
        by_expert = expert.argsort(stable=True)
        parts = rows[by_expert].split(theirs.sum(0).tolist())
        outputs = []
        for part, w1, w2 in zip(parts, self.w1, self.w2, strict=False):
            gate, up = (part @ w1.T).chunk(2, dim=1)
            outputs.append((F.silu(gate) * up) @ w2.T)
        y = torch.empty_like(rows).index_copy(0, by_expert, torch.cat(outputs))
        y = Exchange.apply(y, splits[1], splits[0])
        scaled = y.float() * weights.flatten()[order, None]
        return torch.zeros(x.shape, device=x.device).index_add(0, order // top_k, scaled).to(x.dtype)


# ---- model ----


class Block(nn.Module):
    """Attention, and an MoE layer in the place of the feed-forward one."""

    def __init__(self, sizes: Sizes, experts: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.top_k, self.dtype = sizes.heads, sizes.top_k, dtype
        self.norm1, self.norm2 = nn.LayerNorm(sizes.hidden), nn.LayerNorm(sizes.hidden)
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.project = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.experts = experts

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.project((scores.masked_fill(future, -torch.inf).softmax(3) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        tokens = self.norm2(x).flatten(0, 1)
        weights, idx = self.router(tokens).softmax(1).topk(self.top_k, dim=1)
        out = self.experts(tokens.to(self.dtype), idx, weights / weights.sum(1, keepdim=True))
        return x + out.float().view(x.shape)


class Model(nn.Module):
    def __init__(self, sizes: Sizes, experts: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(VOCABULARY, sizes.hidden), nn.Embedding(sizes.length, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes, each, dtype) for each in experts)
        self.norm, self.head = nn.LayerNorm(sizes.hidden), nn.Linear(sizes.hidden, VOCABULARY, bias=False)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting each byte of data [batch, length + 1] from those before it."""
        x = self.bytes(data[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), data[:, 1:].flatten())


def fill(model: Model, seed: int, device: torch.device) -> None:
    """The same weights whoever computes the experts: replicated ones alike on all ranks, a rank's experts of their own."""
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].replace("moe.", "")):
        is_expert = ".experts." in name
        words = name.replace("moe.", "")
        number = sum(ord(letter) * (i + 1) for i, letter in enumerate(words)) + seed * 7919
        generator = torch.Generator().manual_seed(number + (1 + dist.get_rank() if is_expert else 0) * 104729)
        with torch.no_grad():
            if "norm" in name:
                continue
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(device))


class Optimizer:
    """Adam over f32 values: replicated parameters with averaged gradients, and f32 copies of this rank's experts."""

    def __init__(self, model: Model, rate: float) -> None:
        self.experts = [weight for block in model.blocks for weight in block.experts.weights]
        own = {id(weight) for weight in self.experts}
        self.shared = [parameter for parameter in model.parameters() if id(parameter) not in own]
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in self.experts]
        self.adam = torch.optim.Adam(self.shared + self.masters, lr=rate, betas=(0.9, 0.95))

    def step(self) -> None:
        world = dist.get_world_size()
        flat = torch.cat([parameter.grad.flatten() for parameter in self.shared])
        dist.all_reduce(flat)
        for parameter, grad in zip(self.shared, flat.div_(world).split([p.numel() for p in self.shared]), strict=False):
            parameter.grad.copy_(grad.view_as(parameter))
        for weight, master in zip(self.experts, self.masters, strict=False):  # sums over the tokens of all ranks
            grad = getattr(weight, "main_grad", None)
            master.grad = (weight.grad.float() if grad is None else grad) / world
        self.adam.step()
        with torch.no_grad():
            for weight, master in zip(self.experts, self.masters, strict=False):
                weight.copy_(master)
                weight.grad = None
                if hasattr(weight, "main_grad"):
                    weight.main_grad.zero_()
        for parameter in self.shared:
            parameter.grad = None


# ---- training ----


@dataclasses.dataclass
class Curve:
    """Of every step the loss, mean over the ranks, and the milliseconds."""

    losses: list[float] = dataclasses.field(default_factory=list)
    times_ms: list[float] = dataclasses.field(default_factory=list)

    def median_ms(self) -> float:
        return statistics.median(self.times_ms[len(self.times_ms) // 4 :])


def batch(text: torch.Tensor, sizes: Sizes, seed: int, step: int) -> torch.Tensor:
    """[batch, length + 1] bytes: a function of seed, step and rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 1009 + dist.get_rank())
    starts = torch.randint(len(text) - sizes.length - 1, (sizes.batch,), generator=generator)
    return text[starts[:, None] + torch.arange(sizes.length + 1)]


def train(model: Model, args: argparse.Namespace, text: torch.Tensor, device: torch.device, label: str) -> Curve:
    sizes, optimizer, curve = sizes_of(args), Optimizer(model, args.rate), Curve()
    for step in range(args.steps):
        data = batch(text, sizes, args.seed, step).to(device)
        begin = time.perf_counter()
        if label == "epd" and step == args.kill_step and dist.get_rank() == args.kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(data)
        loss.backward()
        for block in model.blocks:  # before anything else waits for a rank that may be gone
            if isinstance(block.experts, EpdExperts):
                block.experts.moe.check()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        curve.losses.append(mean.item() / dist.get_world_size())
        curve.times_ms.append((time.perf_counter() - begin) * 1e3)
        if dist.get_rank() == 0 and (step % args.report == 0 or step == args.steps - 1):
            print(f"{label:9s} step {step:4d}  loss {curve.losses[-1]:.4f}  {curve.times_ms[-1]:.1f} ms", flush=True)
    return curve


def sizes_of(args: argparse.Namespace) -> Sizes:
    return Sizes(args.layers, args.hidden, args.heads, args.ffn, args.experts, args.top_k, args.length, args.batch)


def train_epd(args: argparse.Namespace, text: torch.Tensor, client: epd.Client, device: torch.device) -> Curve:
    sizes, dtype = sizes_of(args), torch.float32 if device.type == "cpu" else torch.bfloat16
    group = epd.torch.join(
        args.group,
        dist.get_world_size(),
        dist.get_rank(),
        n_experts=sizes.experts,
        top_k=sizes.top_k,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        max_tokens=sizes.batch * sizes.length,
        dtype=dtype,
        client=client,
        device=device,
    )
    with group:  # all layers share the group
        model = Model(sizes, [EpdExperts(group) for _ in range(sizes.layers)], dtype).to(device)
        fill(model, args.seed, device)
        try:
            curve = train(model, args, text, device, "epd")
        except epd.PeerLost as lost:
            path = f"{args.group}-rank{dist.get_rank()}.pt"
            torch.save(model.state_dict(), path)
            print(f"rank {dist.get_rank()}: rank {lost.rank} is lost ({lost}); what this rank has is in {path}", flush=True)
            raise
        group.barrier()
    return curve


def train_plain(args: argparse.Namespace, text: torch.Tensor, device: torch.device) -> Curve:
    sizes, dtype = sizes_of(args), torch.float32 if device.type == "cpu" else torch.bfloat16
    n_local = sizes.experts // dist.get_world_size()
    experts = [PlainExperts(n_local, sizes.hidden, sizes.ffn, dtype, device) for _ in range(sizes.layers)]
    model = Model(sizes, experts, dtype).to(device)
    fill(model, args.seed, device)
    return train(model, args, text, device, "reference")


def compare(epd_curve: Curve, plain: Curve, tolerance: float) -> bool:
    """Prints both and whether their losses agree, relative to each other, at every step."""
    differences = [abs(a / b - 1) for a, b in zip(epd_curve.losses, plain.losses, strict=True)]
    worst = max(differences)
    print(f"step time: epd {epd_curve.median_ms():.2f} ms, reference {plain.median_ms():.2f} ms (medians)")
    print(f"last loss: epd {epd_curve.losses[-1]:.4f}, reference {plain.losses[-1]:.4f}; first {epd_curve.losses[0]:.4f}")
    print(f"largest relative difference of a step's losses {worst:.2e}, allowed {tolerance:.0e}")
    return all(difference <= tolerance for difference in differences)  # a loss that is no number agrees with nothing


def plot(path: str, curves: dict[str, Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4))
    for label, curve in curves.items():
        losses.plot(curve.losses, label=label, alpha=0.8)
        times.plot(curve.times_ms[1:], label=label, alpha=0.8)
    losses.set(xlabel="step", ylabel="loss, nats per byte", yscale="log")
    times.set(xlabel="step", ylabel="step time, ms", ylim=(0, None))
    losses.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3", help="the file to learn (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200)
    for name, value in dict(layers=2, hidden=256, heads=4, ffn=512, experts=16, top_k=2, length=128, batch=16).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=int, default=20, help="a line every so many steps")
    parser.add_argument("--reference", action="store_true", help="train with plain PyTorch experts too, and compare")
    parser.add_argument(
        "--tolerance", type=float, help="of a step's losses, relative (default: 2e-2, on the host backend 1e-4)"
    )
    parser.add_argument("--plot", metavar="FILE", help="save losses and step times as a picture")
    parser.add_argument("--socket", help="of the daemon (default: EPD_SOCKET, else the runtime directory)")
    parser.add_argument("--group", default="train_moe", help="the name under which the ranks meet")
    parser.add_argument("--kill-rank", type=int, default=-1, help="this rank kills itself at --kill-step")
    parser.add_argument("--kill-step", type=int, default=10)
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if "RANK" not in os.environ:
        parser.error("RANK is not set: start this with torchrun --nproc-per-node N")
    if not pathlib.Path(args.text).is_file():
        parser.error(f"--text {args.text}: no such file")
    return args


def main() -> int:
    args = arguments()
    text = torch.frombuffer(bytearray(pathlib.Path(args.text).read_bytes()), dtype=torch.uint8).long()
    with epd.connect(args.socket) as client:
        on_gpu = client.info.backend == epd.Backend.CUDA
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        try:
            curves = {"epd": train_epd(args, text, client, device)}
        except epd.PeerLost:
            return 0  # the process group waits for the lost rank: it is left to end with this process
        agree = True
        if args.reference:
            curves["reference"] = train_plain(args, text, device)
        if dist.get_rank() == 0:
            tolerance = args.tolerance or (2e-2 if on_gpu else 1e-4)
            if args.reference:
                agree = compare(curves["epd"], curves["reference"], tolerance)
            else:
                print(f"step time: epd {curves['epd'].median_ms():.2f} ms (median)")
            if args.plot:
                plot(args.plot, curves)
        dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
