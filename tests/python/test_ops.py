"""The single ops against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import in_group
from reference import gate, slots_of
from values import assert_near, given, load, poisoned, rounded, routing

H, E, K = 16, 4, 2
N_TOKENS = (9, 14)


def inputs(dtype: str, seed: int = 3):
    """x, topk_idx, topk_weights of both ranks."""
    rng = np.random.default_rng(seed)
    x = [rounded(rng.standard_normal((t, H)), dtype) for t in N_TOKENS]
    idx = [routing(rng, t, E, K) for t in N_TOKENS]
    weights = [rng.random((t, K)).astype(np.float32).astype(np.float64) for t in N_TOKENS]
    return x, idx, weights


def run(socket, body, **options):
    return in_group(socket, len(N_TOKENS), body, **({"n_experts": E, "top_k": K, "hidden": H, "max_tokens": 16} | options))


class Exchange:
    """One rank's dispatch plan with all its tensors, launched."""

    def __init__(self, group, dtype, x, idx, weights):
        r, c, n = group.info.rank, group.info.capacity_rows, group.info.n_local_experts
        self.topk_weights = given(group, weights[r], "f32")
        self.recv_x = poisoned(group, (c, H), dtype)
        self.recv_weights, self.m_splits = poisoned(group, (c,), "f32"), poisoned(group, (n,), "i64")
        self.offsets = poisoned(group, (n + 1,), "i64")
        topk_idx = group.alloc(idx[r].shape, "i32")
        topk_idx[...] = idx[r]
        self.plan = group.dispatch(
            x=given(group, x[r], dtype),
            topk_idx=topk_idx,
            topk_weights=self.topk_weights,
            recv_x=self.recv_x,
            recv_weights=self.recv_weights,
            m_splits=self.m_splits,
            offsets=self.offsets,
        )
        self.plan()


@pytest.mark.parametrize(("dtype", "alignment"), [("f32", 1), ("bf16", 8), ("f16", 16)])
def test_dispatch_lays_rows_out_by_expert_source_and_token(socket, dtype, alignment):
    x, idx, weights = inputs(dtype)

    def body(group):
        exchange = Exchange(group, dtype, x, idx, weights)
        want = slots_of(idx, group.info.rank, group.info.n_local_experts, alignment)
        assert (exchange.m_splits == want.m_splits).all() and (exchange.offsets == want.offsets).all()
        rows, n = load(exchange.recv_x), len(want.source)
        for row, source in enumerate(want.source):
            if source is None:
                assert (rows[row] == 0).all() and exchange.recv_weights[row] == 0
            else:
                r, t, k = source
                assert (rows[row] == x[r][t]).all() and exchange.recv_weights[row] == weights[r][t, k]
        assert np.isnan(rows[n:]).all()  # the tail is not touched

    run(socket, body, dtype=dtype, alignment=alignment)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_and_its_backward(socket, dtype, weighted):
    x, idx, weights = inputs(dtype)
    rng = np.random.default_rng(4)
    scale = rounded(rng.standard_normal((E, H)), dtype)  # expert e multiplies by scale[e]
    dout = [rounded(rng.standard_normal(each.shape), dtype) for each in x]

    def body(group):
        r, n_local = group.info.rank, group.info.n_local_experts
        exchange = Exchange(group, dtype, x, idx, weights)
        used = exchange.topk_weights if weighted else None
        w = weights[r] if weighted else np.ones_like(weights[r])
        y = poisoned(group, exchange.recv_x.shape, dtype)
        splits, offsets = exchange.m_splits, exchange.offsets
        y_of = rounded(np.stack([x[r] * scale[e] for e in range(E)]), dtype)  # [E, T, H]: what combine gets back
        for local in range(n_local):
            rows = slice(offsets[local], offsets[local] + splits[local])
            values = rounded(load(exchange.recv_x[rows]) * scale[group.info.first_expert + local], dtype)
            y[rows] = given(group, values, dtype)
        out = poisoned(group, x[r].shape, dtype)
        group.combine(exchange.plan, y=y, out=out, topk_weights=used)()
        routed = idx[r] >= 0
        back = np.stack([y_of[np.where(routed[:, k], idx[r][:, k], 0), np.arange(len(w))] for k in range(K)], axis=1)
        assert_near(out, (back * (w * routed)[:, :, None]).sum(axis=1), dtype, "out")

        dy, d_weights = poisoned(group, y.shape, dtype), poisoned(group, w.shape, "f32")
        arguments = {"dout": given(group, dout[r], dtype), "dy": dy, "topk_weights": used}
        group.combine_bwd(exchange.plan, y=y, d_weights=d_weights, **arguments)()
        want = slots_of(idx, r, n_local, 1)
        all_weights = weights if weighted else [np.ones_like(each) for each in weights]
        expected = np.array([all_weights[s][t, k] * dout[s][t] for s, t, k in want.source])
        assert_near(dy[: len(expected)], expected, dtype, "dy")
        d_want = np.where(routed, (back * dout[r][:, None, :]).sum(axis=2), 0)
        np.testing.assert_allclose(d_weights, d_want, rtol=1e-5, atol=1e-5)

    run(socket, body, dtype=dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_dispatch_backward_sums_the_slots_of_a_token(socket, dtype):
    x, idx, weights = inputs(dtype)
    value = rounded(np.random.default_rng(5).standard_normal((2, 16, K, H)), dtype)  # of (rank, token, k)

    def body(group):
        r = group.info.rank
        exchange = Exchange(group, dtype, x, idx, weights)
        slots = slots_of(idx, r, group.info.n_local_experts, 1)
        d_recv_x, d_recv_weights = (
            poisoned(group, exchange.recv_x.shape, dtype),
            poisoned(group, exchange.recv_weights.shape, "f32"),
        )
        for row, (s, t, k) in enumerate(slots.source):
            d_recv_x[row] = given(group, value[s, t, k], dtype)
            d_recv_weights[row] = 100 * s + 10 * t + k
        dx, d_weights = poisoned(group, x[r].shape, dtype), poisoned(group, weights[r].shape, "f32")
        group.dispatch_bwd(exchange.plan, d_recv_x=d_recv_x, d_recv_weights=d_recv_weights, dx=dx, d_weights=d_weights)()
        n, routed = len(x[r]), idx[r] >= 0
        assert_near(dx, (value[r, :n] * routed[:, :, None]).sum(axis=1), dtype, "dx")
        t, k = np.meshgrid(np.arange(n), np.arange(K), indexing="ij")
        assert (d_weights == np.where(routed, 100 * r + 10 * t + k, 0)).all()

    run(socket, body, dtype=dtype)


SPLITS = (5, 0, 33, 1)
M, GEMM_N, GEMM_K = 45, 12, 20  # rows of the buffers: more than the sum of the splits


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_grouped_gemm_of_every_layout(socket, dtype, packed, parts):
    rng = np.random.default_rng(6)
    n_groups = len(SPLITS)
    gaps = np.zeros(n_groups, int) if packed else np.array([3, 0, 2, 0])
    starts = np.concatenate([[0], np.cumsum(np.array(SPLITS) + gaps)])
    w, x, dy = (rounded(rng.standard_normal(s), dtype) for s in ((n_groups, GEMM_N, GEMM_K), (M, GEMM_K), (M, GEMM_N)))
    bias = rounded(rng.standard_normal((n_groups, GEMM_N)), dtype)
    rows = [slice(s, s + m) for s, m in zip(starts, SPLITS, strict=False)]
    outside = np.ones(M, bool)
    for each in rows:
        outside[each] = False

    def body(group):
        m_splits = group.alloc((n_groups,), "i64")
        m_splits[...] = SPLITS
        layout = {"m_splits": m_splits}
        if not packed:
            layout["offsets"] = group.alloc((n_groups + 1,), "i64")
            layout["offsets"][...] = starts
        weight = [given(group, each, dtype) for each in w] if parts else given(group, w, dtype)
        x_in, dy_in = given(group, x, dtype), given(group, dy, dtype)

        y = poisoned(group, (M, GEMM_N), dtype)
        group.grouped_gemm("TN", a=x_in, b=weight, c=y, bias=given(group, bias, dtype), **layout)()
        dx = poisoned(group, (M, GEMM_K), "f32")
        group.grouped_gemm("nn", a=dy_in, b=weight, c=dx, **layout)()
        for g, each in enumerate(rows):
            assert_near(y[each], x[each] @ w[g].T + bias[g], dtype, "y")
            np.testing.assert_allclose(dx[each], dy[each] @ w[g], rtol=1e-5, atol=1e-4)
        assert np.isnan(load(y)[outside]).all() and np.isnan(dx[outside]).all()

        dw, dbias = poisoned(group, w.shape, "f32"), poisoned(group, bias.shape, "f32")
        targets = [dw[g] for g in range(n_groups)] if parts else dw
        group.grouped_gemm("NT", a=dy_in, b=x_in, c=targets, dbias=dbias, **layout)()
        group.grouped_gemm("NT", a=dy_in, b=x_in, c=targets, dbias=dbias, accumulate=True, **layout)()
        for g, each in enumerate(rows):
            np.testing.assert_allclose(dw[g], 2 * dy[each].T @ x[each], rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(dbias[g], 2 * dy[each].sum(axis=0), rtol=1e-5, atol=1e-4)

    in_group(socket, 1, body, dtype="f32")


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "relu2"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_activation_and_its_backward(socket, kind, dtype):
    rng = np.random.default_rng(7)
    f, splits = 10, (4, 0, 7)
    m = sum(splits)
    preact, d_act = (rounded(rng.standard_normal(s) * 2, dtype) for s in ((m + 2, 2 * f), (m + 2, f)))
    w = rng.random(m + 2).astype(np.float32).astype(np.float64)
    g, up = np.split(preact, 2, axis=1)
    value, slope = gate(kind, g)

    def body(group):
        m_splits = group.alloc((3,), "i64")
        m_splits[...] = splits
        preact_in, weights = given(group, preact, dtype), given(group, w, "f32")
        plain, weighted = poisoned(group, (m + 2, f), dtype), poisoned(group, (m + 2, f), dtype)
        group.activation(kind, preact=preact_in, act=plain, m_splits=m_splits)()
        group.activation(kind, preact=preact_in, act=weighted, m_splits=m_splits, recv_weights=weights)()
        assert_near(plain[:m], (value * up)[:m], dtype)
        assert_near(weighted[:m], (value * up * w[:, None])[:m], dtype)
        assert np.isnan(load(plain)[m:]).all()

        d_preact, d_weights = poisoned(group, preact.shape, dtype), poisoned(group, (m + 2,), "f32")
        act = poisoned(group, (m + 2, f), dtype)
        group.activation_bwd(
            kind,
            preact=preact_in,
            d_act=given(group, d_act, dtype),
            d_preact=d_preact,
            m_splits=m_splits,
            recv_weights=weights,
            d_recv_weights=d_weights,
            act=act,
        )()
        da = d_act * w[:, None]
        assert_near(d_preact[:m], np.concatenate([da * up * slope, da * value], axis=1)[:m], dtype)
        np.testing.assert_allclose(d_weights[:m], (d_act * value * up).sum(axis=1)[:m], rtol=1e-4, atol=1e-4)
        assert_near(act[:m], (value * up * w[:, None])[:m], dtype)

    in_group(socket, 1, body)


def test_any_op_can_be_planned_by_its_name(socket):
    def body(group):
        a, b, c = given(group, np.ones((3, 2)), "f32"), given(group, np.ones((1, 4, 2)), "f32"), poisoned(group, (3, 4), "f32")
        m_splits = group.alloc(1, "i64")
        m_splits[0] = 3
        plan = group.plan("grouped_gemm", layout="TN", a=a, b=b, c=c, m_splits=m_splits, bias=None)
        plan()
        assert (c == 2).all() and plan.op.name == "GROUPED_GEMM" and plan.tensors["c"] is c
        assert set(plan.tensors) == {"a", "b", "c", "m_splits"}

    in_group(socket, 1, body)
