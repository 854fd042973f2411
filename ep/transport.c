#include "ep/transport.h"

#ifdef EPD_HAVE_UCX
extern const struct transport transport_ucx;
#endif

const struct transport *transport_host(struct epd_error *reason)
{
#ifdef EPD_HAVE_UCX
    (void)reason;
    return &transport_ucx;
#else
    (void)error_set(reason, EPD_UNSUPPORTED, "this build has no transport between nodes (built without UCX)");
    return NULL;
#endif
}

const struct transport *transport_cuda(struct epd_error *reason)
{
    (void)error_set(reason, EPD_UNSUPPORTED, "this build has no transport between nodes for CUDA");
    return NULL;
}
