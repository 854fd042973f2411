/* Every word that client/epd.h repeats from the ground floor, by name. Two files expand it: one sees only the
 * public header, the other only proto/. */
#ifndef EPD_TESTS_UNIT_CLIENT_PUBLIC_WORDS_H
#define EPD_TESTS_UNIT_CLIENT_PUBLIC_WORDS_H

struct word {
    const char *name;
    long value;
};

/* Ended by a NULL name. */
extern const struct word public_words[];
extern const struct word ground_words[];

#define WORDS(X)                                                                                             \
    X(EPD_OK)                                                                                                \
    X(EPD_INVALID_ARGUMENT)                                                                                  \
    X(EPD_INVALID_SHAPE)                                                                                     \
    X(EPD_INVALID_DTYPE)                                                                                     \
    X(EPD_INVALID_DEVICE)                                                                                    \
    X(EPD_INVALID_ALIGNMENT)                                                                                 \
    X(EPD_OUT_OF_RANGE)                                                                                      \
    X(EPD_UNKNOWN_ID)                                                                                        \
    X(EPD_FOREIGN_ID)                                                                                        \
    X(EPD_STALE_EPOCH)                                                                                       \
    X(EPD_IN_USE)                                                                                            \
    X(EPD_BUSY)                                                                                              \
    X(EPD_QUOTA)                                                                                             \
    X(EPD_NO_MEMORY)                                                                                         \
    X(EPD_UNSUPPORTED)                                                                                       \
    X(EPD_GROUP_MISMATCH)                                                                                    \
    X(EPD_PLAN_MISMATCH)                                                                                     \
    X(EPD_SEQ_MISMATCH)                                                                                      \
    X(EPD_TIMEOUT)                                                                                           \
    X(EPD_PEER_LOST)                                                                                         \
    X(EPD_EVICTED)                                                                                           \
    X(EPD_RESTARTED)                                                                                         \
    X(EPD_DRAINING)                                                                                          \
    X(EPD_DISCONNECTED)                                                                                      \
    X(EPD_PROTOCOL)                                                                                          \
    X(EPD_VERSION_MISMATCH)                                                                                  \
    X(EPD_PERMISSION)                                                                                        \
    X(EPD_CAPACITY_OVERFLOW)                                                                                 \
    X(EPD_BAD_ROUTING)                                                                                       \
    X(EPD_BAD_SPLITS)                                                                                        \
    X(EPD_SYSTEM)                                                                                            \
    X(EPD_CUDA)                                                                                              \
    X(EPD_NCCL)                                                                                              \
    X(EPD_INTERNAL)                                                                                          \
    X(EPD_DTYPE_UNSPECIFIED)                                                                                 \
    X(EPD_F32)                                                                                               \
    X(EPD_BF16)                                                                                              \
    X(EPD_F16)                                                                                               \
    X(EPD_I32)                                                                                               \
    X(EPD_I64)                                                                                               \
    X(EPD_OP_UNSPECIFIED)                                                                                    \
    X(EPD_OP_BARRIER)                                                                                        \
    X(EPD_OP_DISPATCH)                                                                                       \
    X(EPD_OP_COMBINE)                                                                                        \
    X(EPD_OP_DISPATCH_BWD)                                                                                   \
    X(EPD_OP_COMBINE_BWD)                                                                                    \
    X(EPD_OP_GROUPED_GEMM)                                                                                   \
    X(EPD_OP_ACTIVATION)                                                                                     \
    X(EPD_OP_ACTIVATION_BWD)                                                                                 \
    X(EPD_OP_MOE_FORWARD)                                                                                    \
    X(EPD_OP_MOE_BACKWARD)                                                                                   \
    X(EPD_OP_MOE_WGRAD)                                                                                      \
    X(EPD_OP_COUNT)                                                                                          \
    X(EPD_ROLE_UNSPECIFIED)                                                                                  \
    X(EPD_ROLE_X)                                                                                            \
    X(EPD_ROLE_TOPK_IDX)                                                                                     \
    X(EPD_ROLE_TOPK_WEIGHTS)                                                                                 \
    X(EPD_ROLE_RECV_X)                                                                                       \
    X(EPD_ROLE_RECV_WEIGHTS)                                                                                 \
    X(EPD_ROLE_M_SPLITS)                                                                                     \
    X(EPD_ROLE_OFFSETS)                                                                                      \
    X(EPD_ROLE_Y)                                                                                            \
    X(EPD_ROLE_OUT)                                                                                          \
    X(EPD_ROLE_DOUT)                                                                                         \
    X(EPD_ROLE_DY)                                                                                           \
    X(EPD_ROLE_D_WEIGHTS)                                                                                    \
    X(EPD_ROLE_D_RECV_X)                                                                                     \
    X(EPD_ROLE_D_RECV_WEIGHTS)                                                                               \
    X(EPD_ROLE_DX)                                                                                           \
    X(EPD_ROLE_A)                                                                                            \
    X(EPD_ROLE_B)                                                                                            \
    X(EPD_ROLE_C)                                                                                            \
    X(EPD_ROLE_BIAS)                                                                                         \
    X(EPD_ROLE_DBIAS)                                                                                        \
    X(EPD_ROLE_PREACT)                                                                                       \
    X(EPD_ROLE_ACT)                                                                                          \
    X(EPD_ROLE_D_ACT)                                                                                        \
    X(EPD_ROLE_D_PREACT)                                                                                     \
    X(EPD_ROLE_W1)                                                                                           \
    X(EPD_ROLE_B1)                                                                                           \
    X(EPD_ROLE_W2)                                                                                           \
    X(EPD_ROLE_B2)                                                                                           \
    X(EPD_ROLE_DW1)                                                                                          \
    X(EPD_ROLE_DB1)                                                                                          \
    X(EPD_ROLE_DW2)                                                                                          \
    X(EPD_ROLE_DB2)                                                                                          \
    X(EPD_ROLE_COUNT)                                                                                        \
    X(EPD_GEMM_UNSPECIFIED)                                                                                  \
    X(EPD_GEMM_TN)                                                                                           \
    X(EPD_GEMM_NN)                                                                                           \
    X(EPD_GEMM_NT)                                                                                           \
    X(EPD_ACTIVATION_UNSPECIFIED)                                                                            \
    X(EPD_SWIGLU)                                                                                            \
    X(EPD_GEGLU)                                                                                             \
    X(EPD_RELU2)                                                                                             \
    X(EPD_OVERFLOW_UNSPECIFIED)                                                                              \
    X(EPD_OVERFLOW_ERROR)                                                                                    \
    X(EPD_CROSSING_UNSPECIFIED)                                                                              \
    X(EPD_CROSSING_EAGER)                                                                                    \
    X(EPD_CROSSING_STATIC)                                                                                   \
    X(EPD_OVERFLOW_DROP)                                                                                     \
    X(EPD_SAVED_NONE)                                                                                        \
    X(EPD_SAVED_CONTEXT)                                                                                     \
    X(EPD_SAVED_RECOMPUTE)                                                                                   \
    X(EPD_MEMORY_UNSPECIFIED)                                                                                \
    X(EPD_MEMORY_HEAP)                                                                                       \
    X(EPD_MEMORY_MEMFD)                                                                                      \
    X(EPD_MEMORY_CUDA_IPC)                                                                                   \
    X(EPD_MEMORY_CUDA_VMM)                                                                                   \
    X(EPD_BACKEND_UNSPECIFIED)                                                                               \
    X(EPD_BACKEND_HOST)                                                                                      \
    X(EPD_BACKEND_CUDA)                                                                                      \
    X(EPD_PHASE_NONE)                                                                                        \
    X(EPD_PHASE_GATHER)                                                                                      \
    X(EPD_PHASE_ROUTE)                                                                                       \
    X(EPD_PHASE_DISPATCH)                                                                                    \
    X(EPD_PHASE_GEMM)                                                                                        \
    X(EPD_PHASE_ACTIVATION)                                                                                  \
    X(EPD_PHASE_COMBINE)                                                                                     \
    X(EPD_PHASE_WGRAD)                                                                                       \
    X(EPD_PHASE_COUNT)
#endif
