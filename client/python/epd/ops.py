"""The plan constructors, one per op.

Shapes: T tokens of this rank, H hidden, F ffn, E experts, L = E / world size local experts, K top-k, C capacity rows, all of
the group; M, N and K of a grouped GEMM are free. ``dtype`` stands for the group's dtype. Every tensor is a C-contiguous array
over a buffer of the group (:meth:`epd.Group.alloc`); outputs are the caller's arrays and are overwritten by each launch unless
``accumulate``. A weight is one array ``[L, ...]`` or a list of L arrays without the leading dimension.
"""

from __future__ import annotations

from .plan import Array, Plan, Tensor
from .words import Activation, Crossing, GemmLayout, Op, Saved

ActivationLike = str | Activation


class Ops:
    """What :class:`epd.Group` inherits: each method makes a plan and launches nothing.

    All raise :class:`epd.InvalidShape`, :class:`epd.InvalidDtype`, :class:`epd.InvalidAlignment`, :class:`epd.OutOfRange` or
    :class:`epd.InvalidArgument` with a sentence that names the tensor and the property. Those marked *collective* wait for
    the same call of every rank and also raise :class:`epd.PlanMismatch`, :class:`epd.Timeout` and :class:`epd.PeerLost`.
    """

    def plan(
        self,
        op: str | Op,
        *,
        context: Plan | None = None,
        layout: str | GemmLayout | None = None,
        activation: ActivationLike | None = None,
        saved: str | Saved = Saved.NONE,
        accumulate: bool = False,
        delay_wgrad: bool = False,
        crossing: str | Crossing = Crossing.UNSPECIFIED,
        **tensors: Tensor | None,
    ) -> Plan:
        """A plan of any op, its tensors by role. The constructors below say which op takes what.

        crossing, of dispatch and moe_forward and inherited by the plans whose context they are: "static" or "eager" messages
        between nodes; by default what the backend does best. Of no effect in a group of one node.
        """
        raise NotImplementedError

    def barrier(self) -> Plan:
        """Every rank of the group has arrived. Collective."""
        return self.plan(Op.BARRIER)

    def dispatch(
        self,
        *,
        x: Array,
        topk_idx: Array,
        recv_x: Array,
        topk_weights: Array | None = None,
        m_splits: Array | None = None,
        offsets: Array | None = None,
        recv_weights: Array | None = None,
        crossing: str | Crossing = Crossing.UNSPECIFIED,
    ) -> Plan:
        """Sends every token to the ranks of its experts. Collective.

        In: x [T, H] dtype; topk_idx [T, K] i32 or i64, -1 = not routed; topk_weights [T, K] f32.
        Out: recv_x [C, H] dtype, rows by expert, then source rank, then token; m_splits [L] i64 rows of each expert;
        offsets [L + 1] i64 first row of each expert's slab; recv_weights [C] f32.
        """
        return self.plan(
            Op.DISPATCH,
            crossing=crossing,
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            recv_x=recv_x,
            m_splits=m_splits,
            offsets=offsets,
            recv_weights=recv_weights,
        )

    def combine(self, context: Plan, *, y: Array, out: Array, topk_weights: Array | None = None) -> Plan:
        """``out[t] = sum over k of w[t, k] y(t, k)``, w = 1 without topk_weights; context: a dispatch plan. Collective.

        In: y [C, H] dtype; topk_weights [T, K] f32. Out: out [T, H] dtype.
        """
        return self.plan(Op.COMBINE, context=context, y=y, topk_weights=topk_weights, out=out)

    def combine_bwd(
        self,
        context: Plan,
        *,
        dout: Array,
        dy: Array,
        topk_weights: Array | None = None,
        y: Array | None = None,
        d_weights: Array | None = None,
    ) -> Plan:
        """Backward of combine: ``w[t, k] dout[t]`` into the slots; context: the dispatch plan. Collective.

        In: dout [T, H] dtype; topk_weights [T, K] f32; y [C, H] dtype, for d_weights.
        Out: dy [C, H] dtype; d_weights [T, K] f32, ``<dout[t], y(t, k)>``, 0 where topk_idx is -1.
        """
        return self.plan(Op.COMBINE_BWD, context=context, dout=dout, topk_weights=topk_weights, y=y, dy=dy, d_weights=d_weights)

    def dispatch_bwd(
        self,
        context: Plan,
        *,
        d_recv_x: Array,
        dx: Array,
        d_recv_weights: Array | None = None,
        d_weights: Array | None = None,
    ) -> Plan:
        """Backward of dispatch: slot gradients summed back to their tokens; context: the dispatch plan. Collective.

        In: d_recv_x [C, H] dtype; d_recv_weights [C] f32. Out: dx [T, H] dtype; d_weights [T, K] f32. The last of both come
        together or not at all.
        """
        return self.plan(
            Op.DISPATCH_BWD,
            context=context,
            d_recv_x=d_recv_x,
            d_recv_weights=d_recv_weights,
            dx=dx,
            d_weights=d_weights,
        )

    def grouped_gemm(
        self,
        layout: str | GemmLayout,
        *,
        a: Array,
        b: Tensor,
        c: Tensor,
        m_splits: Array,
        offsets: Array | None = None,
        bias: Array | None = None,
        dbias: Array | None = None,
        accumulate: bool = False,
    ) -> Plan:
        """One matrix product per group of rows; m_splits [L] i64 is read at each launch. Local.

        TN, fprop: a = X [M, K], b = W [L, N, K], bias [L, N] -> c = Y [M, N].
        NN, dgrad: a = dY [M, N], b = W [L, N, K] -> c = dX [M, K].
        NT, wgrad: a = dY [M, N], b = X [M, K] -> c = dW [L, N, K], dbias [L, N]; with accumulate added to what is there.
        a and b have one dtype (f32, bf16 or f16); c has it too or is f32, dW any of the three. Groups start at offsets
        [L + 1] i64, or one after the other without. Only rows of groups are written.
        """
        return self.plan(
            Op.GROUPED_GEMM,
            layout=layout,
            a=a,
            b=b,
            c=c,
            m_splits=m_splits,
            offsets=offsets,
            bias=bias,
            dbias=dbias,
            accumulate=accumulate,
        )

    def activation(
        self,
        kind: ActivationLike = Activation.SWIGLU,
        *,
        preact: Array,
        act: Array,
        m_splits: Array,
        offsets: Array | None = None,
        recv_weights: Array | None = None,
    ) -> Plan:
        """``act = f(gate) * up``, times the row's recv_weights if given. Local.

        In: preact [M, 2F], gate half first; m_splits [L] i64; offsets [L + 1] i64; recv_weights [M] f32. Out: act [M, F].
        """
        return self.plan(
            Op.ACTIVATION,
            activation=kind,
            preact=preact,
            act=act,
            m_splits=m_splits,
            offsets=offsets,
            recv_weights=recv_weights,
        )

    def activation_bwd(
        self,
        kind: ActivationLike = Activation.SWIGLU,
        *,
        preact: Array,
        d_act: Array,
        d_preact: Array,
        m_splits: Array,
        offsets: Array | None = None,
        recv_weights: Array | None = None,
        d_recv_weights: Array | None = None,
        act: Array | None = None,
    ) -> Plan:
        """Backward of activation. Local.

        In: preact [M, 2F]; d_act [M, F]; m_splits [L] i64; offsets [L + 1] i64; recv_weights [M] f32 as in the forward.
        Out: d_preact [M, 2F]; d_recv_weights [M] f32; act [M, F], the activation times recv_weights once more.
        """
        return self.plan(
            Op.ACTIVATION_BWD,
            activation=kind,
            preact=preact,
            d_act=d_act,
            d_preact=d_preact,
            m_splits=m_splits,
            offsets=offsets,
            recv_weights=recv_weights,
            d_recv_weights=d_recv_weights,
            act=act,
        )

    def moe_forward(
        self,
        *,
        x: Array,
        topk_idx: Array,
        w1: Tensor,
        w2: Tensor,
        out: Array,
        topk_weights: Array | None = None,
        b1: Array | None = None,
        b2: Array | None = None,
        m_splits: Array | None = None,
        activation: ActivationLike = Activation.SWIGLU,
        saved: str | Saved = Saved.NONE,
        crossing: str | Crossing = Crossing.UNSPECIFIED,
    ) -> Plan:
        """The whole layer: route, dispatch, GEMM 1, activation, GEMM 2, combine. Collective.

        In: x [T, H] dtype; topk_idx [T, K] i32 or i64, -1 = not routed; topk_weights [T, K] f32; w1 [L, 2F, H] (gate half
        first), b1 [L, 2F], w2 [L, H, F], b2 [L, H], all dtype. Out: out [T, H] dtype; m_splits [L] i64.
        saved: "context" or "recompute" for a moe_backward; recompute reads x, topk_weights and w1 again, so they must hold.
        """
        return self.plan(
            Op.MOE_FORWARD,
            activation=activation,
            saved=saved,
            crossing=crossing,
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            w1=w1,
            b1=b1,
            w2=w2,
            b2=b2,
            out=out,
            m_splits=m_splits,
        )

    def moe_backward(
        self,
        context: Plan,
        *,
        dout: Array,
        dx: Array | None = None,
        d_weights: Array | None = None,
        dw1: Tensor | None = None,
        db1: Array | None = None,
        dw2: Tensor | None = None,
        db2: Array | None = None,
        w1: Tensor | None = None,
        b1: Array | None = None,
        w2: Tensor | None = None,
        b2: Array | None = None,
        accumulate: bool = False,
        delay_wgrad: bool = False,
    ) -> Plan:
        """Gradients of the last launch of a moe_forward plan, its context, made with ``saved``. Collective.

        In: dout [T, H] dtype; w1, b1, w2, b2 as in the forward, those of its plan where not given.
        Out, each on request: dx [T, H] dtype; d_weights [T, K] f32; dw1 [L, 2F, H], db1 [L, 2F], dw2 [L, H, F], db2 [L, H],
        each f32, bf16 or f16, with accumulate added to what is there. With delay_wgrad the last four are left to a moe_wgrad.
        """
        return self.plan(
            Op.MOE_BACKWARD,
            context=context,
            accumulate=accumulate,
            delay_wgrad=delay_wgrad,
            dout=dout,
            w1=w1,
            b1=b1,
            w2=w2,
            b2=b2,
            dx=dx,
            d_weights=d_weights,
            dw1=dw1,
            db1=db1,
            dw2=dw2,
            db2=db2,
        )

    def moe_wgrad(
        self,
        context: Plan,
        *,
        dw1: Tensor | None = None,
        db1: Array | None = None,
        dw2: Tensor | None = None,
        db2: Array | None = None,
        accumulate: bool = False,
    ) -> Plan:
        """The weight gradients that a moe_backward plan, its context, delayed; shapes as there. Local."""
        return self.plan(Op.MOE_WGRAD, context=context, accumulate=accumulate, dw1=dw1, db1=db1, dw2=dw2, db2=db2)
