/* The epd program run to its end, for starts that are to fail and ends that are to be looked at. */
#ifndef EPD_TESTS_FAULT_SPAWN_H
#define EPD_TESTS_FAULT_SPAWN_H

#include <sys/types.h>

/* Starts epd with these arguments (NULL-terminated, without the program's name); standard error goes to
 * log_path. */
pid_t spawn_epd(const char *const *arguments, const char *log_path);
/* Waits for a child; returns its exit code, 1000 + n for signal n, -1 (after killing it) if it does not end
 * within deadline_ms. */
int spawn_wait(pid_t pid, int deadline_ms);
/* 1 if the file contains the text. */
int file_contains(const char *path, const char *text);
/* How many lines of the file contain the text. */
int file_count(const char *path, const char *text);
/* Waits until the file contains the text; 1 if it came within deadline_ms. */
int file_wait(const char *path, const char *text, int deadline_ms);
void sleep_ms(long ms);
double now_ms(void);

#endif
