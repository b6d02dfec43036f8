/* The CPU lane with a thread that never ends its unit: whoever waits for it is told in time, and so is who comes later.
   Prints what lane_wait, lane_submit and lane_wait say, in this order, and that lane_close returns. */

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

static atomic_int hang, hangs;
static __thread int mine;

static float hanging_expf(float x) {
    if (hang && !mine) {
        hangs = 1;
        for (;;) pause();
    }
    while (hang && !hangs) usleep(100); /* until the other thread has got a unit */
    return expf(x);
}

#define expf hanging_expf
#include "cpu_lane.c"

enum { HIDDEN = 64, INNER = 32 };

int main(void) {
    static float block[3 * INNER * HIDDEN], x[HIDDEN], score[1], y[HIDDEN];
    const char *blocks[] = {(const char *)block};
    int32_t first[] = {0, 1}, pair[] = {0};
    mine = 1;
    alarm(20);
    lane_t *lane = lane_open(1, HIDDEN, INNER, 2 * INNER * HIDDEN, 0, 100);
    int before = lane_submit(lane, 1, 0, blocks, first, pair, 1, x, score, y) || lane_wait(lane);
    hang = 1;
    before |= lane_submit(lane, 1, 0, blocks, first, pair, 1, x, score, y);
    int waited = lane_wait(lane);
    int submitted = lane_submit(lane, 1, 0, blocks, first, pair, 1, x, score, y);
    printf("%d %d %d %d ", before, waited, submitted, lane_wait(lane));
    lane_close(lane);
    printf("closed\n");
    return 0;
}
