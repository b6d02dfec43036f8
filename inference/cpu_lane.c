/* Experts of few rows on the CPU, straight from their blocks in host memory, at the speed at which memory is read.

A call is cut into units: first all columns of all experts' gate and up, then all rows of their down. Threads take units
from one counter; a down unit waits until its expert's activation is whole. Every sum belongs to one unit and is added in
one order, in fp32, so that neither the threads nor their number can reach the bits.

Threads look for work without sleeping for a millisecond after a call, since the next layer's comes within that.

Who waits for another thread's unit does so for a time only. Then the lane is lost, for good: nobody knows where that thread
is, so what it reads and writes must stay.

A block: gate [I,H], up [I,H] and, from element down_start on, down [H,I], row after row, bf16 or fp32; or packed (packed.h).
Packed rows are made floats in registers, and what is added, and in which order, is what a block of bf16 would have.
x [T,H], y [P,H] and scores [P] are fp32. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <math.h>
#include <time.h>

#include "packed.h"

#define UP_COLUMNS 16
#define DOWN_ROWS 32
#define MAX_EXPERTS 4096
#ifndef AHEAD
#define AHEAD 1024          /* weights that are asked of memory before their turn */
#endif
#define NONE_LEFT (1 << 30)
#define PATIENCE_NS 1000000 /* for which a thread looks before it goes to sleep */
#define LOOKS 256           /* between two looks at the clock: a pause takes from 5 to 50 ns */
#define GAP_NS 1000000000   /* of the time between two looks, what counts: the process may have been stopped */
#define NO_MEMORY (-1)
#define LOST (-2)

#ifndef LATE
#define LATE() ((void)0) /* where a thread may be late; a test lets it be */
#endif

typedef struct {
    int hidden, inner, is_bf16, threads;
    long down_start, limit_ns;
    pthread_t *thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_int sleeping, stop, lost;
    atomic_uint call;      /* number of the newest call */
    atomic_int told;       /* it has ended, and was counted */
    _Atomic int64_t *count;
    atomic_int busy;       /* threads inside it */
    /* the newest call */
    int experts, up_units, down_units, units, packed;
    const char *block[MAX_EXPERTS];
    const int32_t *first, *pair;
    int choices;
    const float *x, *score;
    float *a, *y;
    long a_pairs;
    atomic_int next, done, up_done[MAX_EXPERTS];
} lane_t;

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

typedef struct { long looks, last, waited; } wait_t;

/* For loops that wait for another thread: whether it is given up, by this one or by any. */
static inline int given_up(lane_t *lane, wait_t *wait) {
    pause_cpu();
    if (++wait->looks % LOOKS) return 0;
    long now = now_ns(), gap = wait->last ? now - wait->last : 0;
    wait->last = now;
    wait->waited += gap < GAP_NS ? gap : GAP_NS;
    if (wait->waited > lane->limit_ns) atomic_store(&lane->lost, 1);
    return atomic_load(&lane->lost);
}

/* Of 32 running sums, always in the order in which 16 lanes have them. */
static inline float sum(const vec *sums) {
    float total = 0;
    for (int part = 0; part < PARTS / 2; part++) {
        vec both = sums[part] + sums[part + PARTS / 2];
        for (int i = 0; i < LANES; i++) total += both[i];
    }
    return total;
}

static inline float scalar(uint16_t h) {
    union { uint32_t i; float f; } u = {(uint32_t)h << 16};
    return u.f;
}

/* Two rows at once: twice as many lines are on their way from memory, and x is loaded once for both. */
static void dots_bf16(const uint16_t *w, const uint16_t *v, const float *x, int n, float *wx, float *vx) {
    vec ws[PARTS] = {0}, vs[PARTS] = {0};
    int i = 0;
    for (; i + GROUP <= n; i += GROUP) {
        __builtin_prefetch(w + i + AHEAD);
        __builtin_prefetch(v + i + AHEAD);
        for (int part = 0; part < PARTS; part++) {
            vec xs = *(const vec *)(x + i + part * LANES);
            ws[part] += widened(w + i + part * LANES) * xs;
            vs[part] += widened(v + i + part * LANES) * xs;
        }
    }
    *wx = sum(ws);
    *vx = sum(vs);
    for (; i < n; i++) {
        *wx += scalar(w[i]) * x[i];
        *vx += scalar(v[i]) * x[i];
    }
}

static void dots_fp32(const float *w, const float *v, const float *x, int n, float *wx, float *vx) {
    vec ws[PARTS] = {0}, vs[PARTS] = {0};
    int i = 0;
    for (; i + GROUP <= n; i += GROUP)
        for (int part = 0; part < PARTS; part++) {
            vec xs = *(const vec *)(x + i + part * LANES);
            ws[part] += *(const vec *)(w + i + part * LANES) * xs;
            vs[part] += *(const vec *)(v + i + part * LANES) * xs;
        }
    float total_w = sum(ws), total_v = sum(vs);
    for (int j = i; j < n; j++) total_w += w[j] * x[j];
    for (int j = i; j < n; j++) total_v += v[j] * x[j];
    *wx = total_w;
    *vx = total_v;
}

/* Of the next exceptions of two rows, the nearer one's place in its row. */
static inline long nearer(const packed_t *block, int32_t we, long w, int32_t ve, long v) {
    long a = exception_place(block, we) - w, b = exception_place(block, ve) - v;
    return a < b ? a : b;
}

/* As dots_bf16, the same sums in the same order, of the rows at elements w and v of a packed block. If there is room for
   both, they are left there as floats. */
static inline __attribute__((always_inline)) void dots_packed(const packed_t *block, long w, long v, const float *x, int n,
                                                              float *room, float *wx, float *vx) {
    const uint8_t *small_w = block->small + w, *codes_w = block->codes + w / 2;
    const uint8_t *small_v = block->small + v, *codes_v = block->codes + v / 2;
    int32_t we = exception_from(block, w), ve = exception_from(block, v);
    long exception = nearer(block, we, w, ve, v);
    words exponents = exponents_of(block);
    vec ws[PARTS] = {0}, vs[PARTS] = {0};
    for (long i = 0; i < n; i += GROUP) {
        vec a[PARTS], b[PARTS];
        __builtin_prefetch(small_w + i + AHEAD);
        __builtin_prefetch(small_v + i + AHEAD);
        __builtin_prefetch(codes_w + (i >> 1) + AHEAD / 2);
        __builtin_prefetch(codes_v + (i >> 1) + AHEAD / 2);
        widened_group(small_w + i, codes_w + (i >> 1), exponents, a);
        widened_group(small_v + i, codes_v + (i >> 1), exponents, b);
        if (__builtin_expect(exception < i + GROUP, 0)) {
            vec c[PARTS], d[PARTS]; /* only these have addresses: the others stay in registers */
            for (int part = 0; part < PARTS; part++) { c[part] = a[part]; d[part] = b[part]; }
            we = patched(block, we, w + i, (float *)c);
            ve = patched(block, ve, v + i, (float *)d);
            exception = nearer(block, we, w, ve, v);
            for (int part = 0; part < PARTS; part++) { a[part] = c[part]; b[part] = d[part]; }
        }
        for (int part = 0; part < PARTS; part++) {
            long at = i + part * LANES;
            vec xs = *(const vec *)(x + at);
            if (room) { *(vec *)(room + at) = a[part]; *(vec *)(room + n + at) = b[part]; }
            ws[part] += a[part] * xs;
            vs[part] += b[part] * xs;
        }
    }
    *wx = sum(ws);
    *vx = sum(vs);
}

/* Two rows of n weights. Packed ones begin at elements w and v of their block. */
typedef struct {
    enum { BF16, FP32, PACKED, PACKED_ONCE } form;
    const void *w_row, *v_row;
    long w, v;
    packed_t packed;
    float *room;
    int n;
} rows_t;

/* Of an expert's block, to be multiplied so many times; `room` is for 2 n floats. */
static inline rows_t rows_of(const lane_t *lane, int expert, long w, long v, int n, int times, float *room) {
    const char *block = lane->block[expert];
    int size = lane->is_bf16 ? 2 : 4;
    rows_t rows = {lane->is_bf16 ? BF16 : FP32, block + w * size, block + v * size, w, v, .room = room, .n = n};
    if (lane->packed) {
        rows.form = times > 1 ? PACKED : PACKED_ONCE;
        rows.packed = packed_at(block, lane->down_start + (long)lane->hidden * lane->inner);
    }
    return rows;
}

static inline void dots(rows_t *rows, const float *x, float *wx, float *vx) {
    switch (rows->form) {
    case BF16: dots_bf16(rows->w_row, rows->v_row, x, rows->n, wx, vx); break;
    case FP32: dots_fp32(rows->w_row, rows->v_row, x, rows->n, wx, vx); break;
    case PACKED_ONCE: dots_packed(&rows->packed, rows->w, rows->v, x, rows->n, NULL, wx, vx); break;
    case PACKED:
        dots_packed(&rows->packed, rows->w, rows->v, x, rows->n, rows->room, wx, vx);
        rows->form = FP32;
        rows->w_row = rows->room;
        rows->v_row = rows->room + rows->n;
    }
}

static void up_unit(lane_t *lane, int expert, int part) {
    int H = lane->hidden, I = lane->inner, end = (part + 1) * UP_COLUMNS, from = lane->first[expert];
    int pairs = lane->first[expert + 1] - from;
    float room[lane->packed && pairs > 1 ? 2 * H : 1] __attribute__((aligned(64)));
    if (end > I) end = I;
    for (int i = part * UP_COLUMNS; i < end; i++) {
        rows_t rows = rows_of(lane, expert, (long)i * H, (long)(I + i) * H, H, pairs, room);
        for (int p = from; p < from + pairs; p++) {
            float gate, up;
            dots(&rows, lane->x + (long)(lane->pair[p] / lane->choices) * H, &gate, &up);
            lane->a[(long)p * I + i] = up * gate / (1.0f + expf(-gate));
        }
    }
    atomic_fetch_add_explicit(&lane->up_done[expert], 1, memory_order_release);
}

/* Returns 0, or LOST before anything is written. */
static int down_unit(lane_t *lane, int expert, int part) {
    int H = lane->hidden, I = lane->inner, end = (part + 1) * DOWN_ROWS, from = lane->first[expert];
    int pairs = lane->first[expert + 1] - from;
    float room[lane->packed && pairs > 1 ? 2 * I : 1] __attribute__((aligned(64)));
    if (end > H) end = H;
    wait_t wait = {0};
    while (atomic_load_explicit(&lane->up_done[expert], memory_order_acquire) < lane->up_units)
        if (given_up(lane, &wait)) return LOST;
    for (int h = part * DOWN_ROWS; h < end; h += 2) {
        int next = h + 1 < end ? h + 1 : h; /* the last of an odd number stands for itself */
        long down = lane->down_start;
        rows_t rows = rows_of(lane, expert, down + (long)h * I, down + (long)next * I, I, pairs, room);
        for (int p = from; p < from + pairs; p++) {
            float *y = lane->y + (long)lane->pair[p] * H, score = lane->score[lane->pair[p]], here, there;
            dots(&rows, lane->a + (long)p * I, &here, &there);
            y[h] = here * score;
            y[next] = there * score;
        }
    }
    return 0;
}

static void work(lane_t *lane) {
    LATE();
    for (;;) {
        /* Nothing of the call may be read before this: a late thread may get its first unit of the next call here. */
        int unit = atomic_fetch_add(&lane->next, 1);
        if (unit >= lane->units) return;
        int ups = lane->experts * lane->up_units;
        if (unit < ups) up_unit(lane, unit / lane->up_units, unit % lane->up_units);
        else if (down_unit(lane, (unit - ups) / lane->down_units, (unit - ups) % lane->down_units)) return;
        if (atomic_fetch_add(&lane->done, 1) + 1 < lane->units) continue;
        if (lane->count) atomic_fetch_add(lane->count, 1);
        atomic_store(&lane->told, 1); /* last: until then nobody takes the call for ended */
    }
}

static void *run(void *argument) {
    lane_t *lane = argument;
    unsigned seen = 0;
    for (;;) {
        long began = now_ns();
        for (long look = 1; atomic_load(&lane->call) == seen && !atomic_load(&lane->stop); look++) {
            if (look % LOOKS || now_ns() - began < PATIENCE_NS) { pause_cpu(); continue; }
            pthread_mutex_lock(&lane->lock);
            atomic_fetch_add(&lane->sleeping, 1);
            while (atomic_load(&lane->call) == seen && !atomic_load(&lane->stop))
                pthread_cond_wait(&lane->wake, &lane->lock);
            atomic_fetch_sub(&lane->sleeping, 1);
            pthread_mutex_unlock(&lane->lock);
        }
        if (atomic_load(&lane->stop)) return NULL;
        LATE();
        atomic_fetch_add(&lane->busy, 1);
        seen = atomic_load(&lane->call);
        work(lane);
        atomic_fetch_sub(&lane->busy, 1);
    }
}

/* Ends its threads; none may be within a call. */
static void give_back(lane_t *lane) {
    atomic_store(&lane->stop, 1);
    pthread_mutex_lock(&lane->lock);
    pthread_cond_broadcast(&lane->wake);
    pthread_mutex_unlock(&lane->lock);
    for (int t = 0; t < lane->threads; t++) pthread_join(lane->thread[t], NULL);
    pthread_mutex_destroy(&lane->lock);
    pthread_cond_destroy(&lane->wake);
    free(lane->thread); free(lane->a); free(lane);
}

/* Returns NULL without memory, or if not all threads could be started. */
lane_t *lane_open(int threads, int hidden, int inner, long down_start, int is_bf16, long limit_ms) {
    lane_t *lane = calloc(1, sizeof(lane_t));
    if (!lane) return NULL;
    lane->hidden = hidden; lane->inner = inner; lane->down_start = down_start; lane->is_bf16 = is_bf16;
    lane->limit_ns = limit_ms * 1000000;
    lane->told = 1;
    lane->up_units = (inner + UP_COLUMNS - 1) / UP_COLUMNS;
    lane->down_units = (hidden + DOWN_ROWS - 1) / DOWN_ROWS;
    pthread_mutex_init(&lane->lock, NULL);
    pthread_cond_init(&lane->wake, NULL);
    lane->thread = calloc(threads > 0 ? threads : 1, sizeof(pthread_t));
    for (; lane->thread && lane->threads < threads; lane->threads++)
        if (pthread_create(&lane->thread[lane->threads], NULL, run, lane)) break;
    if (lane->threads == threads) return lane;
    give_back(lane);
    return NULL;
}

/* Returns 0, or LOST: now or earlier a unit did not end in time. */
int lane_wait(lane_t *lane) {
    if (atomic_load(&lane->lost)) return LOST;
    work(lane);
    wait_t wait = {0};
    while (!atomic_load(&lane->told))
        if (given_up(lane, &wait)) return LOST;
    return 0;
}

/* Whoever ends a call from the next one on adds one to *count, if there is one. No call may be under way. */
void lane_count(lane_t *lane, _Atomic int64_t *count) { lane->count = count; }

/* Begins a call; the arrays must live until lane_wait has returned. pair[first[e]] to pair[first[e + 1]] belong to expert
   e; pair p is row p / choices of x, its score is score[p], its result goes to row p of y. Returns 0, NO_MEMORY or LOST. */
int lane_submit(lane_t *lane, int experts, int packed, const char **block, const int32_t *first, const int32_t *pair,
                int choices, const float *x, const float *score, float *y) {
    wait_t wait = {0};
    if (lane_wait(lane)) return LOST;
    /* A late thread may still ask for a unit of the last call: it must find none, whatever `units` is by then. */
    atomic_store(&lane->next, NONE_LEFT);
    while (atomic_load(&lane->busy))
        if (given_up(lane, &wait)) return LOST;
    LATE();
    long pairs = first[experts];
    lane->units = 0;
    if (experts > MAX_EXPERTS) return NO_MEMORY;
    if (pairs > lane->a_pairs) {
        free(lane->a);
        lane->a = malloc(sizeof(float) * pairs * lane->inner);
        lane->a_pairs = lane->a ? pairs : 0;
        if (!lane->a) return NO_MEMORY;
    }
    for (int e = 0; e < experts; e++) { lane->block[e] = block[e]; atomic_store(&lane->up_done[e], 0); }
    lane->experts = experts; lane->packed = packed; lane->first = first; lane->pair = pair; lane->choices = choices;
    lane->x = x; lane->score = score; lane->y = y;
    atomic_store(&lane->done, 0);
    lane->units = experts * (lane->up_units + lane->down_units);
    if (!lane->units && lane->count) atomic_fetch_add(lane->count, 1); /* of no experts: it has ended, by nobody else */
    atomic_store(&lane->told, !lane->units);
    atomic_store(&lane->next, 0);
    atomic_fetch_add(&lane->call, 1);
    if (atomic_load(&lane->sleeping)) {
        pthread_mutex_lock(&lane->lock);
        pthread_cond_broadcast(&lane->wake);
        pthread_mutex_unlock(&lane->lock);
    }
    return 0;
}

/* Of a lost lane nothing is given back: its thread may go on. */
void lane_close(lane_t *lane) {
    if (lane_wait(lane)) return;
    give_back(lane);
}
