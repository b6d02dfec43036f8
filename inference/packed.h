/* Packed blocks (packed.py has the format): where their parts are, and how elements become floats. */

#ifndef PACKED_H
#define PACKED_H

#include <limits.h>
#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define GROUP 32
#define TILE 4096
#define HEADER 64
#define OTHER 15

/* Vectors as wide as registers are, so that what is added up stays in those. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (GROUP / LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t half_words __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

typedef struct {
    const uint8_t *small, *codes;
    const int32_t *first;
    const uint64_t *exception;
    int base, exceptions;
} packed_t;

static inline packed_t packed_at(const char *block, long elements) {
    long codes = HEADER + elements, first = codes + elements / 2, tiles = (elements + TILE - 1) / TILE;
    long exceptions = (first + 4 * (tiles + 1) + 63) / 64 * 64;
    const int32_t *header = (const int32_t *)block;
    packed_t packed;
    packed.small = (const uint8_t *)block + HEADER;
    packed.codes = (const uint8_t *)block + codes;
    packed.first = (const int32_t *)(block + first);
    packed.exception = (const uint64_t *)(block + exceptions);
    packed.base = header[0];
    packed.exceptions = header[1];
    return packed;
}

/* The element of exception number e; behind the last one no element is left. */
static inline long exception_place(const packed_t *block, int32_t e) {
    return e < block->exceptions ? (long)(block->exception[e] >> 16) : LONG_MAX / 2;
}

/* The number of the first exception at or behind an element. */
static inline int32_t exception_from(const packed_t *block, long element) {
    int32_t e = block->first[element / TILE];
    while (exception_place(block, e) < element) e++;
    return e;
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

/* Compilers make more of a conversion than the one instruction that it is. */
static inline halves widened_bytes(const uint8_t *p) {
#ifdef __AVX2__
    return (halves)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(*(const bytes *)p, halves);
#endif
}

/* 16 elements, exceptions left alone. */
static inline void unpack_half(const uint8_t *small, const uint8_t *codes, int shift, int base, uint16_t *to) {
    halves byte = widened_bytes(small);
    halves code = widened_bytes(codes) >> (uint16_t)shift & 15;
    halves exponent = ((uint16_t)base - code) & (halves)(code != OTHER);
    *(halves *)to = (byte & 0x80) << 8 | exponent << 7 | (byte & 0x7f);
}

static inline void unpack_group(const uint8_t *small, const uint8_t *codes, int base, uint16_t *to) {
    unpack_half(small, codes, 0, base, to);
    unpack_half(small + GROUP / 2, codes, 4, base, to + GROUP / 2);
}

/* LANES elements that are not packed. */
static inline vec widened(const uint16_t *p) {
#if LANES == 8
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else /* of 16 lanes, one instruction instead of a compiler's four would read memory more slowly: measured on a Zen 4 */
    return (vec)(__builtin_convertvector(*(const half_words *)p, words) << 16);
#endif
}

#ifdef __AVX512VBMI__

/* By code, the exponent's bits in their place in a float. */
static inline words exponents_of(const packed_t *block) {
    const words codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, OTHER};
    words bits = ((uint32_t)block->base - codes) << 23;
    bits[OTHER] = 0;
    return bits;
}

#define UPPER(byte) ((byte) << 24 | (byte) << 16)

/* 32 elements, exceptions left alone. One shuffle puts a byte into the two upper bytes of its float: the third has the
   mantissa, the fourth the sign, and rubbish is beside them. A permutation of dwords looks at the lower four bits of its
   index only. */
static inline void widened_group(const uint8_t *small, const uint8_t *codes, words exponents, vec *to) {
    const __m512i upper = _mm512_set_epi32(UPPER(15), UPPER(14), UPPER(13), UPPER(12), UPPER(11), UPPER(10), UPPER(9),
        UPPER(8), UPPER(7), UPPER(6), UPPER(5), UPPER(4), UPPER(3), UPPER(2), UPPER(1), UPPER(0));
    const __m512i half = _mm512_set1_epi32(UPPER(16)), kept = _mm512_set1_epi32(0x807f0000);
    const int kept_or = 0xEC; /* (first & third) | second */
    __m512i byte = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)small));
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    __m512i low = _mm512_permutexvar_epi32(code, (__m512i)exponents);
    __m512i high = _mm512_permutexvar_epi32(_mm512_srli_epi32(code, 4), (__m512i)exponents);
    __m512i low_byte = _mm512_permutexvar_epi8(upper, byte);
    __m512i high_byte = _mm512_permutexvar_epi8(_mm512_add_epi32(upper, half), byte);
    to[0] = (vec)_mm512_ternarylogic_epi32(low_byte, low, kept, kept_or);
    to[1] = (vec)_mm512_ternarylogic_epi32(high_byte, high, kept, kept_or);
}

#else

static inline words exponents_of(const packed_t *block) {
    return (words){0} + ((uint32_t)block->base << 23);
}

/* 32 elements, exceptions left alone. */
static inline void widened_group(const uint8_t *small, const uint8_t *codes, words exponents, vec *to) {
    uint16_t bits[GROUP] __attribute__((aligned(64)));
    unpack_group(small, codes, exponents[0] >> 23, bits);
    for (int part = 0; part < PARTS; part++) to[part] = widened(bits + part * LANES);
}

#endif

#endif
