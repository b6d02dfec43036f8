/* Packing blocks of bf16 weights and unpacking them (packed.py has the format). Any number of threads may do so at once. */

#include <string.h>

#include "packed.h"

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

/* 32 elements; returns whether there are exceptions among them. */
static inline int pack_group(const uint16_t *from, int base, uint8_t *small, uint8_t *codes) {
    uint8_t code[GROUP], outside = 0;
    for (int i = 0; i < GROUP; i++) {
        uint8_t exponent = from[i] >> 7, below = base - exponent; /* wraps around above the base */
        small[i] = (from[i] >> 8 & 0x80) | (from[i] & 0x7f);
        code[i] = below < OTHER ? below : OTHER;
        outside |= below < OTHER ? 0 : exponent;
    }
    for (int i = 0; i < GROUP / 2; i++) codes[i] = code[i] | code[i + GROUP / 2] << 4;
    return outside != 0;
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

/* 16 elements, exceptions left alone. */
static inline void unpack_half(const uint8_t *small, const uint8_t *codes, int shift, uint16_t base, uint16_t *to) {
    for (int j = 0; j < GROUP / 2; j++) {
        uint16_t code = codes[j] >> shift & 15, exponent = base - code;
        to[j] = (uint16_t)((small[j] & 0x80) << 8 | (small[j] & 0x7f) | (code == OTHER ? 0 : exponent) << 7);
    }
}

/* Rows of so many elements, each `stride` behind the one before, the first at element `start`; all three whole groups.
   They come to their places in the block `to`, of which nothing else is written. */
void packed_unpack(const char *block, long elements, long start, long rows, long columns, long stride, uint16_t *to) {
    packed_t at = packed_at(block, elements);
    for (long row = start; rows > 0; rows--, row += stride) {
        for (long i = row; i < row + columns; i += GROUP) {
            unpack_half(at.small + i, at.codes + i / 2, 0, at.base, to + i);
            unpack_half(at.small + i + GROUP / 2, at.codes + i / 2, 4, at.base, to + i + GROUP / 2);
        }
        int32_t e = exception_from(&at, row);
        for (long place; (place = exception_place(&at, e)) < row + columns; e++) to[place] = (uint16_t)at.exception[e];
    }
}
