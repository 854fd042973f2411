#include "experts.h"

#include <math.h>

#include "random.h"

void experts_init(const struct settings *settings, uint32_t first_expert, uint32_t n_experts, float *w1,
                  float *w2)
{
    const size_t w1_size = experts_w1_size(settings), w2_size = experts_w2_size(settings);
    for (uint32_t e = 0; e < n_experts; e++) {
        const uint64_t key = random_at(settings->seed + 0xe49e, first_expert + e);
        random_fill(key, 1.0f / sqrtf((float)settings->hidden), w1 + e * w1_size, w1_size);
        random_fill(key + 1, 0.5f / sqrtf((float)settings->ffn), w2 + e * w2_size, w2_size);
    }
}
