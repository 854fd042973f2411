/* The MoE layer through epd: this rank's membership in the group, its buffers and its two plans. Tokens,
 * weights and gradients live in buffers that this process and the daemon both map; nothing is copied to or
 * from the daemon. The rest of the model is fp32 on the host: where the layer computes in half precision or on a GPU,
 * its tensors are converted on the way in and out (staging.h). One owner, one thread.
 *
 * This file is the part of the example to read when you want to use epd yourself. */
#ifndef TRAIN_MOE_LAYER_EPD_H
#define TRAIN_MOE_LAYER_EPD_H

#include "experts.h"
#include "staging.h"
#include "tokens.h"

enum layer_tensor {
    LAYER_X,
    LAYER_TOPK_IDX,
    LAYER_TOPK_WEIGHTS,
    LAYER_OUT,
    LAYER_DOUT,
    LAYER_W1,
    LAYER_W2,
    LAYER_DX, /* from here on what backward gives */
    LAYER_D_WEIGHTS,
    LAYER_DW1,
    LAYER_DW2,
    LAYER_N_TENSORS
};

struct layer_epd {
    const struct settings *settings; /* borrowed, outlives this */
    struct epd_client *client;       /* owned */
    struct epd_group *group;         /* owned */
    enum epd_dtype
        dtype; /* of tokens and weights in the layer; routing weights and weight gradients are fp32 */
    int on_gpu;
    struct epd_buffer *buffers[LAYER_N_TENSORS];
    struct staging staging[LAYER_N_TENSORS];
    struct epd_plan *forward, *backward;
    struct tokens tokens; /* views of the staged values */
    float *w1, *w2;       /* [n_local_experts, ...] */
    float *dw1, *dw2;     /* overwritten by every backward */
    uint32_t first_expert, n_local_experts;
};

/* What the ranks will find: connects for a moment, prints the daemon's backend, and fills settings->dtype where it was not given:
 * fp32 on the host backend, bf16 on CUDA. Errors have been printed. */
enum epd_status layer_epd_meet(struct settings *settings);
/* Connects, joins the group of this run (collective), makes buffers and plans (collective), fills the
 * weights. Errors have been printed, with the daemon's own sentence. */
enum epd_status layer_epd_open(struct layer_epd *layer, const struct settings *settings);
void layer_epd_close(struct layer_epd *layer);
/* Collective: x, topk_idx, topk_weights -> out */
enum epd_status layer_epd_forward(struct layer_epd *layer);
/* Collective: dout -> dx_experts, d_weights, dw1, dw2 */
enum epd_status layer_epd_backward(struct layer_epd *layer);

/* Whether a step that ended like this may be repeated after layer_epd_recover: the daemon, or its worker, is gone. */
int layer_epd_is_lost(enum epd_status status);
/* Collective, after any rank has lost the daemon: group, buffers and plans again, over the next one. Weights keep
 * their values. */
enum epd_status layer_epd_recover(struct layer_epd *layer);

#endif
