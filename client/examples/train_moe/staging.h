/* A tensor of the MoE layer with two homes: fp32 (or int32) numbers in this process, where the rest of the model computes,
 * and the buffer that epd works on, which may hold bf16 or fp16 and may lie on a GPU. Where the numbers are fp32 on the host
 * backend there is one home only, and push and pull do nothing. One owner, one thread. */
#ifndef TRAIN_MOE_STAGING_H
#define TRAIN_MOE_STAGING_H

#include <stddef.h>

#include <epd.h>

struct staging {
    struct epd_buffer *buffer; /* borrowed, of the group */
    enum epd_dtype dtype;      /* of the buffer: EPD_F32 and EPD_I32 are copied as they are */
    size_t n;                  /* elements */
    int on_gpu;
    void *values; /* [n] float or int32_t: owned, or the buffer's own memory */
    void *packed; /* [n] of dtype on its way; owned; NULL where there is nothing to convert and no GPU */
    int owns_values;
};

enum epd_status staging_init(struct staging *staging, struct epd_buffer *buffer, enum epd_dtype dtype,
                             size_t n, int on_gpu);
/* Also of one whose staging_init has failed, or that was never one (all zero). */
void staging_fini(struct staging *staging);
/* values -> buffer */
enum epd_status staging_push(const struct staging *staging);
/* buffer -> values */
enum epd_status staging_pull(const struct staging *staging);
/* Of floats: values *= factor */
void staging_scale(const struct staging *staging, float factor);

/* One number, rounded to the nearest even. Infinite where fp16 cannot hold it. */
uint16_t staging_to_bf16(float value);
uint16_t staging_to_f16(float value);
float staging_from_bf16(uint16_t bits);
float staging_from_f16(uint16_t bits);

#endif
