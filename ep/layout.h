/* Carving arrays out of one block: the same calls first measure it (base NULL) and then hand out the pieces.
 */
#ifndef EPD_EP_LAYOUT_H
#define EPD_EP_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

/* Pieces start at multiples of this: what a vector load or a descriptor of any backend asks for. */
#define LAYOUT_ALIGNMENT 256u

struct layout {
    char *base;     /* NULL while measuring */
    uint64_t bytes; /* taken so far */
};

/* NULL while measuring. */
static inline void *layout_take(struct layout *layout, uint64_t bytes)
{
    uint64_t at = layout->bytes;
    layout->bytes = (at + bytes + LAYOUT_ALIGNMENT - 1) & ~(uint64_t)(LAYOUT_ALIGNMENT - 1);
    return layout->base ? layout->base + at : NULL;
}

#endif
