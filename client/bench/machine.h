/* What this machine has. */
#ifndef EPD_BENCH_MACHINE_H
#define EPD_BENCH_MACHINE_H

#include <stdint.h>

/* Share of the available memory that a job may plan to use. */
#define MACHINE_MEMORY_SHARE 0.8

/* Bytes of MemAvailable; 0 if unknown. */
double machine_available_bytes(void);
/* That this process may use. */
uint32_t machine_processors(void);

#endif
