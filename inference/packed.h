/* Packed blocks (packed.py has the format): where their parts are, and how 32 elements become floats. */

#ifndef PACKED_H
#define PACKED_H

#include <limits.h>
#include <stdint.h>
#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

#define GROUP 32
#define TILE 4096
#define HEADER 64
#define OTHER 15

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));

typedef struct {
    const uint8_t *small, *codes;
    const int32_t *first;
    const uint64_t *exception;
    int base, exceptions;
} packed_t;

static inline long packed_first(long elements) { return HEADER + elements + elements / 2; }

static inline long packed_exceptions(long elements) {
    return (packed_first(elements) + 4 * ((elements + TILE - 1) / TILE + 1) + 63) / 64 * 64;
}

static inline packed_t packed_at(const char *block, long elements) {
    const char *codes = block + HEADER + elements;
    return (packed_t){
        (const uint8_t *)block + HEADER, (const uint8_t *)codes, (const int32_t *)(block + packed_first(elements)),
        (const uint64_t *)(block + packed_exceptions(elements)), ((const int32_t *)block)[0], ((const int32_t *)block)[1],
    };
}

/* The number of the first exception at or behind an element. */
static inline int32_t exception_from(const packed_t *block, long element) {
    int32_t e = block->first[element / TILE], end = block->first[element / TILE + 1];
    while (e < end && (long)(block->exception[e] >> 16) < element) e++;
    return e;
}

/* Its element; behind all of them beyond the last. */
static inline long exception_place(const packed_t *block, int32_t e) {
    return e < block->exceptions ? (long)(block->exception[e] >> 16) : LONG_MAX / 2;
}

/* Puts the exceptions from number e on, as far as they lie in the 32 elements from `start` on, into their places there.
   Returns the number of the next. */
static inline int32_t patched(const packed_t *block, int32_t e, long start, float *group) {
    for (long place; (place = exception_place(block, e) - start) < GROUP; e++) {
        union { uint32_t i; float f; } bits = {(uint32_t)block->exception[e] << 16};
        group[place] = bits.f;
    }
    return e;
}

/* The exponents' bits by code, in their place in a float. */
static inline words exponent_bits(int base) {
    words bits;
    for (int code = 0; code < 16; code++) bits[code] = code == OTHER ? 0 : (uint32_t)(base - code) << 23;
    return bits;
}

#define UPPER(byte) ((byte) << 24 | (byte) << 16)

/* 32 elements, exceptions left alone. */
static inline void widened_group(const uint8_t *small, const uint8_t *codes, words exponents, vec *low, vec *high) {
#ifdef __AVX512VBMI__
    /* One shuffle puts a byte into the two upper bytes of its float: the third has the mantissa, the fourth the sign, and
       rubbish is beside them. A permutation by dwords looks at the lower four bits of its index only. */
    const __m512i upper = _mm512_set_epi32(UPPER(15), UPPER(14), UPPER(13), UPPER(12), UPPER(11), UPPER(10), UPPER(9),
        UPPER(8), UPPER(7), UPPER(6), UPPER(5), UPPER(4), UPPER(3), UPPER(2), UPPER(1), UPPER(0));
    const __m512i behind = _mm512_set1_epi32(UPPER(16)), kept = _mm512_set1_epi32(0x807f0000);
    __m512i byte = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)small)), by_code = (__m512i)exponents;
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)), other = _mm512_srli_epi32(code, 4);
    __m512i a = _mm512_permutexvar_epi8(upper, byte);
    __m512i b = _mm512_permutexvar_epi8(_mm512_add_epi32(upper, behind), byte);
    const int kept_or = 0xEC; /* (first & third) | second */
    *low = (vec)_mm512_ternarylogic_epi32(a, _mm512_permutexvar_epi32(code, by_code), kept, kept_or);
    *high = (vec)_mm512_ternarylogic_epi32(b, _mm512_permutexvar_epi32(other, by_code), kept, kept_or);
#else
    words code = __builtin_convertvector(*(const bytes *)codes, words), base = {0};
    words a = __builtin_convertvector(*(const bytes *)small, words);
    words b = __builtin_convertvector(*(const bytes *)(small + 16), words);
    base += exponents[0];
    a = (a & 0x80) << 24 | (a & 0x7f) << 16 | ((base - (code << 23 & 0x7800000)) & (words)((code & 15) != OTHER));
    b = (b & 0x80) << 24 | (b & 0x7f) << 16 | ((base - (code << 19 & 0x7800000)) & (words)((code >> 4) != OTHER));
    *low = (vec)a;
    *high = (vec)b;
#endif
}

#endif
