/* The CPU lane with the same experts packed and as they are, for processors with wide vectors and without: of one to four
   rows, and with exceptions in rows and at their ends. Prints how many results differ, and how many weights that were
   unpacked. */

#include <stdio.h>
#include <string.h>

#include "cpu_lane.c"
#include "packed.c"

enum { HIDDEN = 160, INNER = 96, EXPERTS = 3, ROWS = 4, WEIGHTS = 3 * INNER * HIDDEN, ROOM = 2 * WEIGHTS };

static uint16_t weight(unsigned number) {
    unsigned drawn = number * 2654435761u >> 8, exponent = 110 + drawn % 12;
    if (drawn % 331 == 0) exponent = drawn % 256;
    return (uint16_t)((drawn & 1) << 15 | (exponent % 255) << 7 | (drawn >> 12 & 0x7f));
}

int main(void) {
    static uint16_t block[EXPERTS][WEIGHTS], back[WEIGHTS];
    static char packed[EXPERTS][ROOM] __attribute__((aligned(64)));
    static float x[ROWS * HIDDEN], score[ROWS * EXPERTS], y[2][ROWS * EXPERTS * HIDDEN];
    const char *blocks[2][EXPERTS];
    int32_t first[EXPERTS + 1], pair[ROWS * EXPERTS];
    int differ = 0, unpacked = 0;
    for (int e = 0; e < EXPERTS; e++) {
        for (int i = 0; i < WEIGHTS; i++) block[e][i] = weight(e * WEIGHTS + i);
        block[e][0] = block[e][HIDDEN - 1] = block[e][WEIGHTS - 1] = 0x0080; /* the smallest that is not subnormal */
        if (!packed_pack(block[e], WEIGHTS, packed[e])) return 1;
        packed_unpack(packed[e], WEIGHTS, 0, 1, WEIGHTS, WEIGHTS, back);
        for (int i = 0; i < WEIGHTS; i++) unpacked += back[i] != block[e][i];
        blocks[0][e] = (const char *)block[e];
        blocks[1][e] = packed[e];
    }
    for (int i = 0; i < ROWS * HIDDEN; i++) x[i] = (i % 11 - 5) / 7.f;
    for (int i = 0; i < ROWS * EXPERTS; i++) score[i] = 1.f / (1 + i);
    lane_t *lane = lane_open(1, HIDDEN, INNER, 2 * INNER * HIDDEN, 1, 60000);
    for (int rows = 1; rows <= ROWS; rows++) {
        for (int e = 0; e <= EXPERTS; e++) first[e] = e * rows;
        for (int p = 0; p < rows * EXPERTS; p++) pair[p] = p % rows * EXPERTS + p / rows;
        for (int form = 0; form < 2; form++) {
            lane_submit(lane, EXPERTS, form, blocks[form], first, pair, EXPERTS, x, score, y[form]);
            lane_wait(lane);
        }
        for (int i = 0; i < rows * EXPERTS * HIDDEN; i++) differ += memcmp(&y[0][i], &y[1][i], sizeof(float)) != 0;
    }
    lane_close(lane);
    printf("%d differ, %d of the weights\n", differ, unpacked);
    return 0;
}
