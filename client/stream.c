#include "client/stream.h"

enum epd_status stream_ops_for(enum epd_backend_kind kind, const struct stream_ops **ops,
                               struct epd_error *error)
{
#ifdef EPD_HAVE_CUDA
    if (kind == EPD_BACKEND_CUDA) {
        *ops = &stream_cuda;
        return EPD_OK;
    }
#endif
    if (kind != EPD_BACKEND_HOST)
        return error_set(error, EPD_UNSUPPORTED,
                         "the daemon runs the %s backend, this libepd was built without it",
                         backend_name(kind));
    *ops = &stream_host;
    return EPD_OK;
}
