/* `epdctl doctor`: looks at the machine and says what keeps epd from working or from being fast, and how to
 * fix it. */
#ifndef EPD_EPDCTL_DOCTOR_H
#define EPD_EPDCTL_DOCTOR_H

#include "client/epdctl/command.h"

enum finding_level { FINDING_OK, FINDING_WARN, FINDING_FAIL };

struct doctor {
    uint32_t n_findings[3]; /* by level */
};

/* Prints one line: level, what was looked at, what was found; for warn and fail a second line with the fix.
 */
void doctor_report(struct doctor *doctor, enum finding_level level, const char *what, const char *fix,
                   const char *format, ...) __attribute__((format(printf, 5, 6)));

/* doctor_cuda.c: driver, devices, peer access, MPS. Needs no CUDA at build time. */
void doctor_cuda(struct doctor *doctor);

/* COMMAND_REFUSED if anything failed. Warnings do not count. */
enum command_exit doctor_run(const struct command *command);

#endif
