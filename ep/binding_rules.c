#include "ep/binding_rules.h"

#include <stddef.h>

/* clang-format off */
#define END {.role = EPD_ROLE_UNSPECIFIED}
#define NEED(r, type_, ...) \
    {.role = EPD_ROLE_##r, .need = BINDING_REQUIRED, .type = type_, .dims = {__VA_ARGS__}}
#define MAY(r, type_, ...) \
    {.role = EPD_ROLE_##r, .need = BINDING_OPTIONAL, .type = type_, .dims = {__VA_ARGS__}}
#define MAY_WITH(r, other, type_, ...) \
    {.role = EPD_ROLE_##r, .need = BINDING_OPTIONAL, .type = type_, .dims = {__VA_ARGS__}, \
     .needs = EPD_ROLE_##other}
#define WEIGHTS(r, need_, type_, ...) \
    {.role = EPD_ROLE_##r, .need = need_, .type = type_, .dims = {__VA_ARGS__}, .takes_parts = 1}

static const struct binding_rule barrier_rules[] = {END};

static const struct binding_rule dispatch_rules[] = {
    NEED(X,            TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    NEED(TOPK_IDX,     TYPE_INDEX, DIM_TOKENS, DIM_TOP_K),
    MAY(TOPK_WEIGHTS,  TYPE_F32,   DIM_TOKENS, DIM_TOP_K),
    NEED(RECV_X,       TYPE_GROUP, DIM_CAPACITY, DIM_HIDDEN),
    MAY(RECV_WEIGHTS,  TYPE_F32,   DIM_CAPACITY),
    MAY(M_SPLITS,      TYPE_I64,   DIM_LOCAL),
    MAY(OFFSETS,       TYPE_I64,   DIM_LOCAL_PLUS_1),
    END,
};

static const struct binding_rule combine_rules[] = {
    NEED(Y,            TYPE_GROUP, DIM_CAPACITY, DIM_HIDDEN),
    MAY(TOPK_WEIGHTS,  TYPE_F32,   DIM_TOKENS, DIM_TOP_K),
    NEED(OUT,          TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    END,
};

static const struct binding_rule dispatch_bwd_rules[] = {
    NEED(D_RECV_X,       TYPE_GROUP, DIM_CAPACITY, DIM_HIDDEN),
    NEED(DX,             TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    MAY_WITH(D_RECV_WEIGHTS, D_WEIGHTS, TYPE_F32, DIM_CAPACITY),
    MAY_WITH(D_WEIGHTS, D_RECV_WEIGHTS, TYPE_F32, DIM_TOKENS, DIM_TOP_K),
    END,
};

static const struct binding_rule combine_bwd_rules[] = {
    NEED(DOUT,         TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    MAY(TOPK_WEIGHTS,  TYPE_F32,   DIM_TOKENS, DIM_TOP_K),
    NEED(DY,           TYPE_GROUP, DIM_CAPACITY, DIM_HIDDEN),
    MAY(Y,             TYPE_GROUP, DIM_CAPACITY, DIM_HIDDEN),
    MAY_WITH(D_WEIGHTS, Y, TYPE_F32, DIM_TOKENS, DIM_TOP_K),
    END,
};

static const struct binding_rule gemm_tn_rules[] = {
    NEED(M_SPLITS,     TYPE_I64,   DIM_GROUPS),
    MAY(OFFSETS,       TYPE_I64,   DIM_GROUPS_PLUS_1),
    NEED(A,            TYPE_FREE,  DIM_ROWS, DIM_K),
    WEIGHTS(B, BINDING_REQUIRED, TYPE_FREE, DIM_GROUPS, DIM_N, DIM_K),
    NEED(C,            TYPE_FREE_OR_F32, DIM_ROWS, DIM_N),
    MAY(BIAS,          TYPE_FLOAT, DIM_GROUPS, DIM_N),
    END,
};

static const struct binding_rule gemm_nn_rules[] = {
    NEED(M_SPLITS,     TYPE_I64,   DIM_GROUPS),
    MAY(OFFSETS,       TYPE_I64,   DIM_GROUPS_PLUS_1),
    NEED(A,            TYPE_FREE,  DIM_ROWS, DIM_N),
    WEIGHTS(B, BINDING_REQUIRED, TYPE_FREE, DIM_GROUPS, DIM_N, DIM_K),
    NEED(C,            TYPE_FREE_OR_F32, DIM_ROWS, DIM_K),
    END,
};

static const struct binding_rule gemm_nt_rules[] = {
    NEED(M_SPLITS,     TYPE_I64,   DIM_GROUPS),
    MAY(OFFSETS,       TYPE_I64,   DIM_GROUPS_PLUS_1),
    NEED(A,            TYPE_FREE,  DIM_ROWS, DIM_N),
    NEED(B,            TYPE_FREE,  DIM_ROWS, DIM_K),
    WEIGHTS(C, BINDING_REQUIRED, TYPE_FLOAT, DIM_GROUPS, DIM_N, DIM_K),
    MAY(DBIAS,         TYPE_FLOAT, DIM_GROUPS, DIM_N),
    END,
};

/* RECV_WEIGHTS, where bound, also multiplies the rows of ACT. */
static const struct binding_rule activation_rules[] = {
    NEED(M_SPLITS,     TYPE_I64,   DIM_GROUPS),
    MAY(OFFSETS,       TYPE_I64,   DIM_GROUPS_PLUS_1),
    NEED(ACT,          TYPE_FREE,  DIM_ROWS, DIM_ACT),
    NEED(PREACT,       TYPE_FREE,  DIM_ROWS, DIM_ACT_TWICE),
    MAY(RECV_WEIGHTS,  TYPE_F32,   DIM_ROWS),
    END,
};

/* RECV_WEIGHTS: the weights that the forward multiplied by. Out on request: D_RECV_WEIGHTS, their gradient, and ACT, the
 * weighted activation that dW2 is made from. */
static const struct binding_rule activation_bwd_rules[] = {
    NEED(M_SPLITS,     TYPE_I64,   DIM_GROUPS),
    MAY(OFFSETS,       TYPE_I64,   DIM_GROUPS_PLUS_1),
    NEED(D_ACT,        TYPE_FREE,  DIM_ROWS, DIM_ACT),
    NEED(PREACT,       TYPE_FREE,  DIM_ROWS, DIM_ACT_TWICE),
    NEED(D_PREACT,     TYPE_FREE,  DIM_ROWS, DIM_ACT_TWICE),
    MAY(RECV_WEIGHTS,  TYPE_F32,   DIM_ROWS),
    MAY(D_RECV_WEIGHTS, TYPE_F32,  DIM_ROWS),
    MAY(ACT,           TYPE_FREE,  DIM_ROWS, DIM_ACT),
    END,
};

#define FORWARD_WEIGHTS(need_) \
    WEIGHTS(W1, need_, TYPE_GROUP, DIM_LOCAL, DIM_FFN_TWICE, DIM_HIDDEN), \
    MAY(B1,            TYPE_GROUP, DIM_LOCAL, DIM_FFN_TWICE), \
    WEIGHTS(W2, need_, TYPE_GROUP, DIM_LOCAL, DIM_HIDDEN, DIM_FFN), \
    MAY(B2,            TYPE_GROUP, DIM_LOCAL, DIM_HIDDEN)

#define WEIGHT_GRADIENTS \
    WEIGHTS(DW1, BINDING_OPTIONAL, TYPE_FLOAT, DIM_LOCAL, DIM_FFN_TWICE, DIM_HIDDEN), \
    MAY(DB1,           TYPE_FLOAT, DIM_LOCAL, DIM_FFN_TWICE), \
    WEIGHTS(DW2, BINDING_OPTIONAL, TYPE_FLOAT, DIM_LOCAL, DIM_HIDDEN, DIM_FFN), \
    MAY(DB2,           TYPE_FLOAT, DIM_LOCAL, DIM_HIDDEN)

static const struct binding_rule moe_forward_rules[] = {
    NEED(X,            TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    NEED(TOPK_IDX,     TYPE_INDEX, DIM_TOKENS, DIM_TOP_K),
    MAY(TOPK_WEIGHTS,  TYPE_F32,   DIM_TOKENS, DIM_TOP_K),
    FORWARD_WEIGHTS(BINDING_REQUIRED),
    NEED(OUT,          TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    MAY(M_SPLITS,      TYPE_I64,   DIM_LOCAL),
    END,
};

/* W1, B1, W2, B2: those of the forward plan unless bound again. */
static const struct binding_rule moe_backward_rules[] = {
    NEED(DOUT,         TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    FORWARD_WEIGHTS(BINDING_OPTIONAL),
    MAY(DX,            TYPE_GROUP, DIM_TOKENS, DIM_HIDDEN),
    MAY(D_WEIGHTS,     TYPE_F32,   DIM_TOKENS, DIM_TOP_K),
    WEIGHT_GRADIENTS,
    END,
};

static const struct binding_rule moe_wgrad_rules[] = {WEIGHT_GRADIENTS, END};
/* clang-format on */

static const struct binding_rule *const rules_of_op[EPD_OP_COUNT] = {
    [EPD_OP_BARRIER] = barrier_rules,
    [EPD_OP_DISPATCH] = dispatch_rules,
    [EPD_OP_COMBINE] = combine_rules,
    [EPD_OP_DISPATCH_BWD] = dispatch_bwd_rules,
    [EPD_OP_COMBINE_BWD] = combine_bwd_rules,
    [EPD_OP_ACTIVATION] = activation_rules,
    [EPD_OP_ACTIVATION_BWD] = activation_bwd_rules,
    [EPD_OP_MOE_FORWARD] = moe_forward_rules,
    [EPD_OP_MOE_BACKWARD] = moe_backward_rules,
    [EPD_OP_MOE_WGRAD] = moe_wgrad_rules,
};

const struct binding_rule *binding_rules(enum epd_op op, enum epd_gemm_layout layout)
{
    if (op == EPD_OP_GROUPED_GEMM)
        return layout == EPD_GEMM_TN   ? gemm_tn_rules
               : layout == EPD_GEMM_NN ? gemm_nn_rules
               : layout == EPD_GEMM_NT ? gemm_nt_rules
                                       : NULL;
    return op > EPD_OP_UNSPECIFIED && op < EPD_OP_COUNT ? rules_of_op[op] : NULL;
}
