/* Numbers with their units, as a person reads them: three figures, a fitting prefix. What is not known (NaN)
 * is "-". Each returns its text argument, which has room for QUANTITY_BYTES. Any thread. */
#ifndef EPD_EPDCTL_QUANTITY_H
#define EPD_EPDCTL_QUANTITY_H

#define QUANTITY_BYTES 40

/* 0, 17, 1234567 -> "1234567"; from ten million on with a prefix: "12.3 M". */
char *quantity_count(char *text, double count);
/* "512 B", "1.50 MiB" */
char *quantity_memory(char *text, double bytes);
/* "830 ns", "12.3 us", "4.56 ms", "1.20 s" */
char *quantity_duration(char *text, double ns);
/* "3 s", "2 min 5 s", "4 h 10 min", "3 d 7 h" */
char *quantity_age(char *text, double ms);
/* "12.3 k/s"; unit is what is counted, put between prefix and "/s" ("B", "FLOP", ""). */
char *quantity_rate(char *text, double per_second, const char *unit);
/* "71 %" of a share 0..1 */
char *quantity_share(char *text, double share);
/* "1.85x" */
char *quantity_ratio(char *text, double ratio);

#endif
