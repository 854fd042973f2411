#include "client/bench/machine.h"

#include <sched.h>
#include <stdio.h>

double machine_available_bytes(void)
{
    char line[128];
    double kib = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && kib == 0 && fgets(line, sizeof(line), file))
        (void)sscanf(line, "MemAvailable: %lf kB", &kib);
    if (file)
        fclose(file);
    return kib * 1024;
}

uint32_t machine_processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}
