/* The flag words of plans as the GPU reaches them: flag_* of the CUDA backend. Lane thread. */
#ifndef EPD_EP_CUDA_FLAGS_H
#define EPD_EP_CUDA_FLAGS_H

#include "ep/backend.h"

EPD_MUST_CHECK enum epd_status cuda_flag_open(struct backend_device *device, struct backend_flag *flag,
                                              struct epd_error *error);
void cuda_flag_close(struct backend_device *device, struct backend_flag *flag);
EPD_MUST_CHECK enum epd_status cuda_flag_ready(struct backend_queue *queue, const struct backend_flag *flag,
                                               uint64_t *ticket, struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_flag_done(struct backend_queue *queue, const struct backend_flag *flag,
                                              struct epd_error *error);

#endif
