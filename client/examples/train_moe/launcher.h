/* Starts the rank processes, waits for them, and ends the others when one of them fails. */
#ifndef TRAIN_MOE_LAUNCHER_H
#define TRAIN_MOE_LAUNCHER_H

#include "exchange.h"

/* argv is passed on to the ranks. exchange is the launcher's own mapping, exchange_fd what the ranks inherit.
 * Returns EPD_OK when every rank ended well; the ranks have printed their errors, the launcher adds which
 * rank ended how. */
enum epd_status launcher_run(const struct settings *settings, struct exchange *exchange, int exchange_fd,
                             int argc, char **argv);

#endif
