/* What happens once: loading kernels before anything waits, and flags at zero. */
#include "kernels/cuda/exchange.cuh"

enum epd_status cuda_kernels_load(struct epd_error *error)
{
    enum epd_status status = dispatch_load(error);
    if (status == EPD_OK)
        status = combine_load(error);
    if (status == EPD_OK)
        status = scalars_load(error);
    if (status == EPD_OK)
        status = report_load(error);
    if (status == EPD_OK)
        status = hop_load(error);
    if (status == EPD_OK)
        status = activation_load(error);
    return status;
}

enum epd_status cuda_workspace_reset_launch(const struct cuda_workspace *layout, void *workspace,
                                            struct CUstream_st *stream, struct epd_error *error)
{
    return cuda_check(cudaMemsetAsync(workspace, 0, layout->stage, stream), "workspace reset", error);
}
