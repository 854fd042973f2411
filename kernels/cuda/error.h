/* What a CUDA error means to who asked for the work: numbers shared by the runtime and the driver. Any thread. */
#ifndef EPD_KERNELS_CUDA_ERROR_H
#define EPD_KERNELS_CUDA_ERROR_H

#include "proto/status.h"

/* EPD_OK; EPD_NO_MEMORY, EPD_SYSTEM (an fd, a limit of the process), EPD_UNSUPPORTED and EPD_INTERNAL (a call that was wrong)
 * fail one call and leave the context as it was. Everything else is EPD_CUDA: the context is lost, as after an illegal
 * address or a failed launch, and only a new process helps. Codes that this list does not know count as that. */
enum epd_status cuda_error_status(int code);

#endif
