#include "random.h"

/* Multiply-and-shift mixing, three rounds: neighbouring keys and counters give unrelated numbers. */
uint64_t random_at(uint64_t key, uint64_t n)
{
    uint64_t value = (key + 1) * 0x9e3779b97f4a7c15u ^ (n + 1) * 0xd1342543de82ef95u;
    for (int round = 0; round < 3; round++) {
        value ^= value >> 32;
        value *= 0xda942042e4dd58b5u;
    }
    return value ^ value >> 29;
}

void random_fill(uint64_t key, float deviation, float *values, size_t n)
{
    /* An even distribution over [-a, a) has the deviation a / sqrt(3). */
    const float half_width = deviation * 1.7320508f;
    for (size_t i = 0; i < n; i++) {
        float unit = (float)(random_at(key, i) >> 40) * (1.0f / 16777216.0f);
        values[i] = (2.0f * unit - 1.0f) * half_width;
    }
}
