/* Inside of memory, for the files of ep. Loop thread. */
#ifndef EPD_EP_MEMORY_IMPL_H
#define EPD_EP_MEMORY_IMPL_H

#include "ep/memory.h"

/* Where the memory lies; stays while it lives. */
void *memory_data(const struct memory *memory);
/* A plan's reference. */
void memory_bind(struct memory *memory);
void memory_unbind(struct memory *memory);

#endif
