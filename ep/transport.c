#include "ep/transport.h"

#ifdef EPD_HAVE_UCX
extern const struct transport transport_ucx;
#endif
#ifdef EPD_HAVE_CUDA
extern const struct transport transport_nccl;
#endif

static const struct transport *transport_host(struct epd_error *reason)
{
#ifdef EPD_HAVE_UCX
    (void)reason;
    return &transport_ucx;
#else
    (void)error_set(reason, EPD_UNSUPPORTED, "this build has no transport between nodes (built without UCX)");
    return NULL;
#endif
}

static const struct transport *transport_cuda(struct epd_error *reason)
{
#ifdef EPD_HAVE_CUDA
    (void)reason;
    return &transport_nccl;
#else
    (void)error_set(reason, EPD_UNSUPPORTED, "this build has no CUDA");
    return NULL;
#endif
}

const struct transport *transport_find(enum epd_backend_kind backend, struct epd_error *reason)
{
    return backend == EPD_BACKEND_CUDA ? transport_cuda(reason) : transport_host(reason);
}
