/* What is said about the losses at the end: the list on disk, first and last, and whether two runs agree. */
#ifndef TRAIN_MOE_LOSSES_H
#define TRAIN_MOE_LOSSES_H

#include "settings.h"
#include <epd.h>

/* Writes one line per step: step, loss, and the reference's loss if there is one (reference may be NULL). */
enum epd_status losses_write(const char *path, const double *losses, const double *reference,
                             uint32_t n_steps);
void losses_print_summary(const char *who, const double *losses, uint32_t n_steps);
/* What two runs may differ by: as given, else by the layer's dtype and routing. In half precision every number of the layer is rounded
 * to 8 (bf16) or 11 (fp16) bits in every step, and the weights of the two runs drift apart. Where tokens choose among the experts
 * that is not what decides: a token between two experts takes another one in one of the runs, whose loss then differs by
 * much more than any rounding, in either dtype. */
double losses_tolerance(const struct settings *settings);
/* Prints the largest relative difference and where it is; returns 1 if it is within the tolerance and all are
 * finite. */
int losses_agree(const double *losses, const double *reference, uint32_t n_steps, double tolerance);

#endif
