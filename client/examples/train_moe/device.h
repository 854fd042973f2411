/* Memory of a GPU as the example needs it: which GPU this process uses, and copies. Without CUDA in the build
 * device_absent.c stands in and refuses. One thread. */
#ifndef TRAIN_MOE_DEVICE_H
#define TRAIN_MOE_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include <epd.h>

/* Makes the GPU with this UUID current. Errors have been printed. */
enum epd_status device_select(const uint8_t uuid[16]);
/* Between host memory and memory of the current GPU, either way; done when it returns. Errors have been printed. */
enum epd_status device_copy(void *to, const void *from, size_t n_bytes);

#endif
