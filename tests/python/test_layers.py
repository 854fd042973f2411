"""The whole layer, forward and backward, against the float64 reference: dtypes, activations, routings, saved modes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ranks import in_group
from reference import Layer
from values import assert_near, given, poisoned, rounded, routing, store

H, F = 24, 20


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    dtype: str = "f32"
    idx_dtype: str = "i64"
    n_tokens: tuple[int, ...] = (17, 32)  # of each rank
    n_experts: int = 6
    top_k: int = 2
    alignment: int = 1
    activation: str = "swiglu"
    saved: str = "context"
    bias: bool = True
    parts: bool = False  # weights as lists, one array per expert
    all_to_one: bool = False
    grad_dtype: str = "f32"
    delayed: bool = False
    accumulate: bool = False


CASES = [
    Case("f32"),
    Case("bf16", dtype="bf16", alignment=8),
    Case("f16", dtype="f16", activation="geglu", alignment=16),
    Case("bf16_gradients", dtype="bf16", grad_dtype="bf16", idx_dtype="i32"),
    Case("geglu", activation="geglu", idx_dtype="i32"),
    Case("relu2", activation="relu2", bias=False),
    Case("recompute", saved="recompute", alignment=4),
    Case("weight_lists", parts=True),
    Case("one_rank", n_tokens=(31,)),
    Case("four_ranks_one_without_tokens", n_tokens=(5, 0, 33, 1), n_experts=8, top_k=3),
    Case("no_tokens_at_all", n_tokens=(0, 0)),
    Case("all_to_one_expert", top_k=1, all_to_one=True),
    Case("delayed_wgrad", delayed=True),
    Case("accumulate", accumulate=True),
    Case("accumulate_delayed_bf16", dtype="bf16", accumulate=True, delayed=True),
]


@dataclasses.dataclass
class Data:
    """Inputs of every rank and the reference's results."""

    layer: Layer
    x: list
    idx: list
    weights: list
    dout: list
    out: list
    grads: list  # of each rank's tokens: dx, d_weights and its part of the weights' gradients
    total: dict  # the weights' gradients of all tokens


def make_data(case: Case) -> Data:
    rng = np.random.default_rng(len(case.name))

    def normal(*shape):
        return rounded(rng.standard_normal(shape) * 0.5, case.dtype)

    e, biased = case.n_experts, case.bias
    layer = Layer(
        kind=case.activation,
        w1=normal(e, 2 * F, H),
        b1=normal(e, 2 * F) if biased else None,
        w2=normal(e, H, F),
        b2=normal(e, H) if biased else None,
    )
    x = [normal(t, H) for t in case.n_tokens]
    dout = [normal(t, H) for t in case.n_tokens]
    weights = [rng.random((t, case.top_k)).astype(np.float32).astype(np.float64) for t in case.n_tokens]
    idx = [routing(rng, t, e, case.top_k) for t in case.n_tokens]
    if case.all_to_one:
        idx = [np.full((t, 1), e - 1) for t in case.n_tokens]
    tokens = list(zip(x, idx, weights, strict=True))
    grads = [layer.backward(*each, dout=d) for each, d in zip(tokens, dout, strict=True)]
    total = {name: sum(g[name] for g in grads) for name in ("dw1", "db1", "dw2", "db2")}
    return Data(layer, x, idx, weights, dout, [layer.forward(*each) for each in tokens], grads, total)


def weight(group, case: Case, values: np.ndarray):
    """This rank's slice of a weight: one array, or a list of one per expert."""
    first, n = group.info.first_expert, group.info.n_local_experts
    if case.parts and values.ndim == 3:
        return [given(group, part, case.dtype) for part in values[first : first + n]]
    return given(group, values[first : first + n], case.dtype)


def check_rank(group, case: Case, data: Data) -> None:
    r, first, n = group.info.rank, group.info.first_expert, group.info.n_local_experts
    t, dtype, layer = case.n_tokens[r], case.dtype, data.layer
    topk_idx = group.alloc((t, case.top_k), case.idx_dtype)
    topk_idx[...] = data.idx[r]
    weights = {name: weight(group, case, getattr(layer, name)) for name in ("w1", "w2")}
    if case.bias:
        weights |= {name: weight(group, case, getattr(layer, name)) for name in ("b1", "b2")}
    out, m_splits = poisoned(group, (t, H), dtype), poisoned(group, (n,), "i64")
    forward = group.moe_forward(
        x=given(group, data.x[r], dtype),
        topk_idx=topk_idx,
        topk_weights=given(group, data.weights[r], "f32"),
        out=out,
        m_splits=m_splits,
        activation=case.activation,
        saved=case.saved,
        **weights,
    )
    dx, d_weights = poisoned(group, (t, H), dtype), poisoned(group, (t, case.top_k), "f32")
    shapes = {"dw1": (n, 2 * F, H), "dw2": (n, H, F)} | ({"db1": (n, 2 * F), "db2": (n, H)} if case.bias else {})
    start = 0.25  # what accumulated gradients are added to
    grads = {name: poisoned(group, shape, case.grad_dtype) for name, shape in shapes.items()}
    if case.accumulate:
        for array in grads.values():
            store(array, np.full(array.shape, start))
    if case.parts:
        grads |= {name: [grads[name][i] for i in range(n)] for name in ("dw1", "dw2")}
    now = {} if case.delayed else grads | {"accumulate": case.accumulate}
    dout = given(group, data.dout[r], dtype)
    backward = group.moe_backward(forward, dout=dout, dx=dx, d_weights=d_weights, delay_wgrad=case.delayed, **now)
    wgrad = group.moe_wgrad(backward, accumulate=case.accumulate, **grads) if case.delayed else None

    forward()
    assert_near(out, data.out[r], dtype, "out")
    counts = np.bincount(np.concatenate([i[i >= 0] for i in data.idx]).ravel(), minlength=case.n_experts)
    assert (m_splits == counts[first : first + n]).all()
    assert (forward.info.saved_bytes > 0) == (case.saved == "context")
    backward()
    if wgrad:
        wgrad()
    assert_near(dx, data.grads[r]["dx"], dtype, "dx")
    got, want = d_weights, data.grads[r]["d_weights"]
    scale = float(np.sqrt(np.mean(want**2))) if want.size else 0.0
    np.testing.assert_allclose(got, want, rtol=1e-5, atol={"f32": 1e-5, "f16": 2**-7, "bf16": 2**-4}[dtype] * (1 + scale))
    coarsest = case.grad_dtype if case.grad_dtype != "f32" else dtype
    for name, array in grads.items():
        mine = data.total[name][first : first + n] + (start if case.accumulate else 0)
        for i in range(n):
            assert_near(array[i], mine[i], coarsest, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_matches_the_reference(socket, case):
    data = make_data(case)
    in_group(
        socket,
        len(case.n_tokens),
        lambda group: check_rank(group, case, data),
        n_experts=case.n_experts,
        top_k=case.top_k,
        hidden=H,
        ffn=F,
        max_tokens=max(max(case.n_tokens), 1),
        alignment=case.alignment,
        dtype=case.dtype,
    )


def test_same_inputs_give_the_same_bits_and_set_tokens_leaves_the_tail_alone(socket):
    case = Case("bits", n_tokens=(16, 16))
    data = make_data(case)

    def body(group):
        r, n = group.info.rank, group.info.n_local_experts
        first = group.info.first_expert
        x, out = given(group, data.x[r], "f32"), poisoned(group, (16, H), "f32")
        topk_idx = group.alloc((16, 2), "i64")
        topk_idx[...] = data.idx[r]
        plan = group.moe_forward(
            x=x,
            topk_idx=topk_idx,
            topk_weights=given(group, data.weights[r], "f32"),
            w1=given(group, data.layer.w1[first : first + n], "f32"),
            w2=given(group, data.layer.w2[first : first + n], "f32"),
            out=out,
        )
        plan()
        whole = out.copy()
        plan()
        assert (out.view(np.uint32) == whole.view(np.uint32)).all()
        out[...] = np.nan
        plan.set_tokens(5 if r == 0 else 0)
        plan()
        n_mine = 5 if r == 0 else 0
        assert_near(out[:n_mine], whole[:n_mine].astype(np.float64), "f32")  # other row counts may round otherwise
        assert np.isnan(out[n_mine:]).all()
        plan.set_tokens(16)
        plan()
        assert (out.view(np.uint32) == whole.view(np.uint32)).all()
        assert plan.info.launches == 4 and plan.info.failed_launches == 0

    in_group(socket, 2, body, n_experts=6, hidden=H, ffn=F, max_tokens=16)
