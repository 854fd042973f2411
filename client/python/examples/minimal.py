"""The smallest complete use of epd: a group of one rank runs one MoE layer (route, dispatch, two grouped GEMMs with SwiGLU
between, combine) on random tokens. Needs a daemon on the host backend."""

import epd
import numpy as np

T, H, F, E, K = 64, 32, 48, 8, 2

with (
    epd.connect(name="minimal") as client,
    client.join("minimal", world_size=1, rank=0, n_experts=E, top_k=K, hidden=H, ffn=F, max_tokens=T) as group,
):
    rng = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        array = group.alloc(shape)
        array[...] = rng.uniform(-0.5, 0.5, shape)
        return array

    topk_idx = group.alloc((T, K), "i32")
    topk_idx[...] = np.arange(T * K).reshape(T, K) % E  # the K experts of a token differ
    out = group.alloc((T, H))
    layer = group.moe_forward(
        x=random(T, H),
        topk_idx=topk_idx,
        topk_weights=random(T, K),
        w1=random(E, 2 * F, H),
        w2=random(E, H, F),
        out=out,
    )
    layer()
    print(f"sum of the layer's output: {out.sum():f}")
