#include "daemon/number_set.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#define AND_MORE " and more"

/* The last number of the run that begins there. */
static unsigned run_end(uint64_t set, unsigned first)
{
    unsigned last = first;
    while (last < 63 && set >> (last + 1) & 1)
        last++;
    return last;
}

void number_set_name(uint64_t set, char *text, size_t bytes)
{
    size_t length = 0;
    assert(bytes >= 32);
    text[0] = 0;
    for (unsigned first = 0; first < 64; first++) {
        char word[16];
        if (!(set >> first & 1))
            continue;
        const unsigned last = run_end(set, first);
        const int is_run = last >= first + 2;
        const int n = is_run ? snprintf(word, sizeof(word), " %u..%u", first, last)
                             : snprintf(word, sizeof(word), " %u", first);
        const int is_last = !(is_run ? (last < 63 && set >> (last + 1)) : (first < 63 && set >> (first + 1)));
        if (length + (size_t)n + (is_last ? 1 : sizeof(AND_MORE)) > bytes) {
            memcpy(text + length, AND_MORE, sizeof(AND_MORE));
            return;
        }
        memcpy(text + length, word, (size_t)n + 1);
        length += (size_t)n;
        first = is_run ? last : first;
    }
}
