/* Sets of small numbers (ranks, nodes) as text: bit n for number n. Any thread. */
#ifndef EPD_DAEMON_NUMBER_SET_H
#define EPD_DAEMON_NUMBER_SET_H

#include <stddef.h>
#include <stdint.h>

/* " 1 3..6 9": runs of three and more as their ends; " 1 3..6 and more" where there is no room for all. bytes: 32 or more. */
void number_set_name(uint64_t set, char *text, size_t bytes);

#endif
