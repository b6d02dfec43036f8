/* The CPU lane with threads that come late wherever they may: calls of one to three and of eight experts in turn, each
   of which must have the results of the first, and be counted. Prints how many were not so; `hangs` after three seconds
   without an end. */

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void late(void) {
    static __thread unsigned seed;
    if (!seed) seed = (unsigned)(unsigned long)&seed >> 4 | 1;
    seed = seed * 1664525u + 1013904223u;
    if ((seed >> 16) % 4 == 0) usleep((seed >> 8) % 100);
}

#define LATE() late()
#include "cpu_lane.c"

enum { HIDDEN = 64, INNER = 32, EXPERTS = 8, CALLS = 10000 };

static void hangs(int signal) {
    (void)signal;
    static const char said[] = "hangs\n";
    (void)!write(1, said, sizeof said - 1);
    _exit(1);
}

int main(void) {
    static float block[EXPERTS][3 * INNER * HIDDEN], x[HIDDEN], score[EXPERTS], y[EXPERTS * HIDDEN], want[EXPERTS * HIDDEN];
    const char *blocks[EXPERTS];
    int32_t first[EXPERTS + 1], pair[EXPERTS];
    static _Atomic int64_t count;
    int wrong = 0;
    for (int e = 0; e < EXPERTS; e++) {
        blocks[e] = (const char *)block[e];
        for (int i = 0; i < 3 * INNER * HIDDEN; i++) block[e][i] = ((i * 7 + e * 13) % 17 - 8) / 64.f;
        score[e] = 1;
        first[e] = pair[e] = e;
    }
    first[EXPERTS] = EXPERTS;
    for (int i = 0; i < HIDDEN; i++) x[i] = (i % 5 - 2) / 3.f;
    signal(SIGALRM, hangs);
    lane_t *lane = lane_open(1, HIDDEN, INNER, 2 * INNER * HIDDEN, 0, 60000);
    lane_submit(lane, EXPERTS, 0, blocks, first, pair, EXPERTS, x, score, want);
    lane_wait(lane);
    lane_count(lane, &count);
    for (int call = 0; call < CALLS; call++) {
        wrong += count != call;
        int experts = call % 2 ? EXPERTS : 1 + call % 3;
        alarm(3);
        memset(y, 0, sizeof y);
        lane_submit(lane, experts, 0, blocks, first, pair, EXPERTS, x, score, y);
        lane_wait(lane);
        wrong += memcmp(y, want, sizeof(float) * HIDDEN * experts) != 0;
    }
    alarm(0);
    wrong += count != CALLS;
    lane_close(lane);
    printf("%d wrong\n", wrong);
    return 0;
}
