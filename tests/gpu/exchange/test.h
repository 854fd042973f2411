/* The parts of the test program. Each check returns the number of failures. */
#ifndef EPD_TESTS_GPU_EXCHANGE_TEST_H
#define EPD_TESTS_GPU_EXCHANGE_TEST_H

/* fused = 0: only stage by stage (for the sanitizers). small: only the
 * small cases; > 1: only some of them. */
int test_exchange(int fused, int small);
int test_activation(void);
int test_abort(void);
/* list NULL: default block counts; else "blocks:send,blocks:send,..". only NULL: all cases. */
int bench_exchange(const char *only, const char *dispatch_list, const char *combine_list, int iterations);
/* Of hop_test. */
void bench_hop(void);

#endif
