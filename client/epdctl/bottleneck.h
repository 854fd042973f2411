/* What holds the node back, read from two stats documents of one worker: waiting for late ranks, a phase of the work, uneven
 * experts. Pure. */
#ifndef EPD_EPDCTL_BOTTLENECK_H
#define EPD_EPDCTL_BOTTLENECK_H

#include <jansson.h>
#include <stdio.h>

/* A rank that held up its group longest between the documents. */
struct late_rank {
    const json_t *group, *rank; /* borrowed from the later document; NULL: none did */
    double n_times;             /* steps that it was the last to ask for, */
    double n_steps;             /* of so many */
    double held_up_ns;          /* that the others waited for it */
};

/* before: the same group in the earlier document, NULL: since the start. */
struct late_rank bottleneck_late_rank(const json_t *group, const json_t *before);
/* The object of array[key] in document whose id_key is that of `like`; NULL if there is none. */
const json_t *bottleneck_find(const json_t *document, const char *key, const char *id_key,
                              const json_t *like);

/* Where a step's time goes, by op, and a few sentences about why; nothing if nothing has run. before NULL, or nothing ran since:
 * since the start. */
void bottleneck_print(const json_t *stats, const json_t *before, FILE *out);

#endif
