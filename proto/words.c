#include "proto/words.h"

/* Names are looked up by number in tables; a hole in a table is an unknown word. */
#define NAME_OF(table, number) name_of(table, sizeof(table) / sizeof((table)[0]), (unsigned)(number))

static const char *name_of(const char *const *names, size_t n_names, unsigned number)
{
    if (number >= n_names || !names[number])
        return "?";
    return names[number];
}

size_t dtype_bytes(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_F32:
    case EPD_I32:
        return 4;
    case EPD_BF16:
    case EPD_F16:
        return 2;
    case EPD_I64:
        return 8;
    case EPD_DTYPE_UNSPECIFIED:
        break;
    }
    return 0;
}

const char *dtype_name(enum epd_dtype dtype)
{
    static const char *const names[] = {
        [EPD_F32] = "f32", [EPD_BF16] = "bf16", [EPD_F16] = "f16", [EPD_I32] = "i32", [EPD_I64] = "i64"};

    return NAME_OF(names, dtype);
}

const char *op_name(enum epd_op op)
{
    static const char *const names[EPD_OP_COUNT] = {
        [EPD_OP_BARRIER] = "barrier",         [EPD_OP_DISPATCH] = "dispatch",
        [EPD_OP_COMBINE] = "combine",         [EPD_OP_DISPATCH_BWD] = "dispatch_bwd",
        [EPD_OP_COMBINE_BWD] = "combine_bwd", [EPD_OP_GROUPED_GEMM] = "grouped_gemm",
        [EPD_OP_ACTIVATION] = "activation",   [EPD_OP_ACTIVATION_BWD] = "activation_bwd",
        [EPD_OP_MOE_FORWARD] = "moe_forward", [EPD_OP_MOE_BACKWARD] = "moe_backward",
        [EPD_OP_MOE_WGRAD] = "moe_wgrad",
    };

    return NAME_OF(names, op);
}

const char *role_name(enum epd_role role)
{
    static const char *const names[EPD_ROLE_COUNT] = {
        [EPD_ROLE_X] = "x",
        [EPD_ROLE_TOPK_IDX] = "topk_idx",
        [EPD_ROLE_TOPK_WEIGHTS] = "topk_weights",
        [EPD_ROLE_RECV_X] = "recv_x",
        [EPD_ROLE_RECV_WEIGHTS] = "recv_weights",
        [EPD_ROLE_M_SPLITS] = "m_splits",
        [EPD_ROLE_OFFSETS] = "offsets",
        [EPD_ROLE_Y] = "y",
        [EPD_ROLE_OUT] = "out",
        [EPD_ROLE_DOUT] = "dout",
        [EPD_ROLE_DY] = "dy",
        [EPD_ROLE_D_WEIGHTS] = "d_weights",
        [EPD_ROLE_D_RECV_X] = "d_recv_x",
        [EPD_ROLE_D_RECV_WEIGHTS] = "d_recv_weights",
        [EPD_ROLE_DX] = "dx",
        [EPD_ROLE_A] = "a",
        [EPD_ROLE_B] = "b",
        [EPD_ROLE_C] = "c",
        [EPD_ROLE_BIAS] = "bias",
        [EPD_ROLE_DBIAS] = "dbias",
        [EPD_ROLE_PREACT] = "preact",
        [EPD_ROLE_ACT] = "act",
        [EPD_ROLE_D_ACT] = "d_act",
        [EPD_ROLE_D_PREACT] = "d_preact",
        [EPD_ROLE_W1] = "w1",
        [EPD_ROLE_B1] = "b1",
        [EPD_ROLE_W2] = "w2",
        [EPD_ROLE_B2] = "b2",
        [EPD_ROLE_DW1] = "dw1",
        [EPD_ROLE_DB1] = "db1",
        [EPD_ROLE_DW2] = "dw2",
        [EPD_ROLE_DB2] = "db2",
    };

    return NAME_OF(names, role);
}

const char *phase_name(enum epd_phase phase)
{
    static const char *const names[EPD_PHASE_COUNT] = {
        [EPD_PHASE_NONE] = "none",       [EPD_PHASE_GATHER] = "gather",
        [EPD_PHASE_ROUTE] = "route",     [EPD_PHASE_DISPATCH] = "dispatch",
        [EPD_PHASE_GEMM] = "gemm",       [EPD_PHASE_ACTIVATION] = "activation",
        [EPD_PHASE_COMBINE] = "combine", [EPD_PHASE_WGRAD] = "wgrad",
    };

    return NAME_OF(names, phase);
}

const char *activation_name(enum epd_activation activation)
{
    static const char *const names[] = {
        [EPD_SWIGLU] = "swiglu", [EPD_GEGLU] = "geglu", [EPD_RELU2] = "relu2"};

    return NAME_OF(names, activation);
}

const char *crossing_name(enum epd_crossing crossing)
{
    static const char *const names[] = {[EPD_CROSSING_EAGER] = "eager", [EPD_CROSSING_STATIC] = "static"};

    return NAME_OF(names, crossing);
}

const char *gemm_layout_name(enum epd_gemm_layout layout)
{
    static const char *const names[] = {[EPD_GEMM_TN] = "tn", [EPD_GEMM_NN] = "nn", [EPD_GEMM_NT] = "nt"};

    return NAME_OF(names, layout);
}

const char *backend_name(enum epd_backend_kind kind)
{
    static const char *const names[] = {[EPD_BACKEND_HOST] = "host", [EPD_BACKEND_CUDA] = "cuda"};

    return NAME_OF(names, kind);
}

int op_is_collective(enum epd_op op)
{
    switch (op) {
    case EPD_OP_BARRIER:
    case EPD_OP_DISPATCH:
    case EPD_OP_COMBINE:
    case EPD_OP_DISPATCH_BWD:
    case EPD_OP_COMBINE_BWD:
    case EPD_OP_MOE_FORWARD:
    case EPD_OP_MOE_BACKWARD:
        return 1;
    case EPD_OP_GROUPED_GEMM:
    case EPD_OP_ACTIVATION:
    case EPD_OP_ACTIVATION_BWD:
    case EPD_OP_MOE_WGRAD:
    case EPD_OP_UNSPECIFIED:
    case EPD_OP_COUNT:
        break;
    }
    return 0;
}
