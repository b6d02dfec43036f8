/* Packing blocks of bf16 weights and unpacking them (packed.py has the format). Any number of threads may do so at once. */

#include <string.h>

#include "packed.h"

typedef uint64_t quads __attribute__((vector_size(32)));

#define ELEMENTS_PER_EXCEPTION 128
#define TABLES 4 /* neighbours are counted in different ones: they often have the same exponent */

static inline unsigned field(uint16_t bits) { return bits >> 7 & 0xff; }

/* The smallest exponent field such that it and the 14 below have most of the weights. None of them is 0. */
static int chosen_base(const uint16_t *block, long elements) {
    uint32_t count[TABLES][256] = {{0}}, upto[257] = {0}, most = 0;
    int base = OTHER;
    for (long i = 0; i < elements; i += TABLES)
        for (int t = 0; t < TABLES; t++) count[t][field(block[i + t])]++;
    for (int f = 0; f < 256; f++) {
        upto[f + 1] = upto[f];
        for (int t = 0; t < TABLES; t++) upto[f + 1] += count[t][f];
    }
    for (int f = OTHER; f < 256; f++) {
        uint32_t inside = upto[f + 1] - upto[f + 1 - OTHER];
        if (inside > most) { most = inside; base = f; }
    }
    return base;
}

/* Codes of 16 elements; adds to `outside` what is not 0 for exceptions among them. */
static inline halves codes_of(halves bits, int base, halves *outside) {
    halves exponent = bits >> 7 & 0xff, below = (uint16_t)base - exponent; /* wraps around above the base */
    halves inside = (halves)(below < OTHER);
    *outside |= exponent & ~inside;
    return (below & inside) | (OTHER & ~inside);
}

/* 32 elements; returns whether there are exceptions among them. */
static inline int pack_group(const uint16_t *from, int base, uint8_t *small, uint8_t *codes) {
    halves low = *(const halves *)from, high = *(const halves *)(from + GROUP / 2), outside = {0};
    *(bytes *)small = __builtin_convertvector((low >> 8 & 0x80) | (low & 0x7f), bytes);
    *(bytes *)(small + GROUP / 2) = __builtin_convertvector((high >> 8 & 0x80) | (high & 0x7f), bytes);
    halves low_codes = codes_of(low, base, &outside), high_codes = codes_of(high, base, &outside);
    *(bytes *)codes = __builtin_convertvector(low_codes | high_codes << 4, bytes);
    quads any = (quads)outside;
    return (any[0] | any[1] | any[2] | any[3]) != 0;
}

/* Returns the used bytes, or 0 if the block has too many exceptions; `to` must have room for as many as there may be. */
long packed_pack(const uint16_t *block, long elements, char *to) {
    int base = chosen_base(block, elements), count = 0, most = elements / ELEMENTS_PER_EXCEPTION;
    packed_t at = packed_at(to, elements);
    uint8_t *small = (uint8_t *)at.small, *codes = (uint8_t *)at.codes;
    int32_t *first = (int32_t *)at.first, *header = (int32_t *)to;
    uint64_t *exception = (uint64_t *)at.exception;
    for (long i = 0; i < elements; i += GROUP) {
        if (i % TILE == 0) *first++ = count;
        if (!pack_group(block + i, base, small + i, codes + i / 2)) continue;
        for (int j = 0; j < GROUP; j++) {
            unsigned exponent = field(block[i + j]);
            if (!exponent || (unsigned)(base - (int)exponent) < OTHER) continue;
            if (count == most) return 0;
            exception[count++] = (uint64_t)(i + j) << 16 | block[i + j];
        }
    }
    *first++ = count;
    memset(first, 0, (char *)exception - (char *)first);
    memset(to, 0, HEADER);
    header[0] = base;
    header[1] = count;
    return (char *)(exception + count) - to;
}

/* Rows of so many elements, each `stride` behind the one before, the first at element `start`; all three whole groups.
   They come to their places in the block `to`, of which nothing else is written. */
void packed_unpack(const char *block, long elements, long start, long rows, long columns, long stride, uint16_t *to) {
    packed_t at = packed_at(block, elements);
    for (long row = start; rows > 0; rows--, row += stride) {
        for (long i = row; i < row + columns; i += GROUP) unpack_group(at.small + i, at.codes + i / 2, at.base, to + i);
        int32_t e = exception_from(&at, row);
        for (long place; (place = exception_place(&at, e)) < row + columns; e++) to[place] = (uint16_t)at.exception[e];
    }
}

/* Whether this processor computes packed weights as fast as it reads them; without these instructions at a quarter of that. */
int packed_is_quick(void) {
#if defined(__AVX2__) || defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}
