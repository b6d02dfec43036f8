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

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));

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
    return (packed_t){
        (const uint8_t *)block + HEADER,          (const uint8_t *)block + codes, (const int32_t *)(block + first),
        (const uint64_t *)(block + exceptions), header[0],                      header[1],
    };
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

/* By code, the exponent's bits in their place in a float. */
static inline words exponents_of(const packed_t *block) {
    words bits = {0};
    for (int code = 0; code < OTHER; code++) bits[code] = (uint32_t)(block->base - code) << 23;
    return bits;
}

#define UPPER(byte) ((byte) << 24 | (byte) << 16)

/* 32 elements, exceptions left alone. */
static inline void widened_group(const uint8_t *small, const uint8_t *codes, words exponents, vec *low, vec *high) {
#ifdef __AVX512VBMI__
    /* One shuffle puts a byte into the two upper bytes of its float: the third has the mantissa, the fourth the sign, and
       rubbish is beside them. A permutation of dwords looks at the lower four bits of its index only. */
    const __m512i upper = _mm512_set_epi32(UPPER(15), UPPER(14), UPPER(13), UPPER(12), UPPER(11), UPPER(10), UPPER(9),
        UPPER(8), UPPER(7), UPPER(6), UPPER(5), UPPER(4), UPPER(3), UPPER(2), UPPER(1), UPPER(0));
    const __m512i half = _mm512_set1_epi32(UPPER(16)), kept = _mm512_set1_epi32(0x807f0000);
    const int kept_or = 0xEC; /* (first & third) | second */
    __m512i byte = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)small));
    __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    __m512i low_exponent = _mm512_permutexvar_epi32(code, (__m512i)exponents);
    __m512i high_exponent = _mm512_permutexvar_epi32(_mm512_srli_epi32(code, 4), (__m512i)exponents);
    __m512i low_byte = _mm512_permutexvar_epi8(upper, byte);
    __m512i high_byte = _mm512_permutexvar_epi8(_mm512_add_epi32(upper, half), byte);
    *low = (vec)_mm512_ternarylogic_epi32(low_byte, low_exponent, kept, kept_or);
    *high = (vec)_mm512_ternarylogic_epi32(high_byte, high_exponent, kept, kept_or);
#elif defined(__AVX2__)
    __m256i *to[2] = {(__m256i *)low, (__m256i *)high};
    for (int part = 0; part < 4; part++) {
        __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + part % 2 * 8)));
        code = part < 2 ? _mm256_and_si256(code, _mm256_set1_epi32(15)) : _mm256_srli_epi32(code, 4);
        __m256i exponent = _mm256_sub_epi32(_mm256_set1_epi32(exponents[0]), _mm256_slli_epi32(code, 23));
        exponent = _mm256_andnot_si256(_mm256_cmpeq_epi32(code, _mm256_set1_epi32(OTHER)), exponent);
        /* A byte that takes its sign along, moved by 16, has sign and mantissa in their places, and rubbish between. */
        __m256i byte = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(small + part * 8)));
        byte = _mm256_and_si256(_mm256_slli_epi32(byte, 16), _mm256_set1_epi32(0x807f0000));
        _mm256_storeu_si256(to[part / 2] + part % 2, _mm256_or_si256(byte, exponent));
    }
#else
    uint32_t base = exponents[0], bits[GROUP];
    for (int j = 0; j < GROUP; j++) {
        uint32_t byte = small[j], code = codes[j % 16] >> j / 16 * 4 & 15;
        bits[j] = (byte & 0x80) << 24 | (byte & 0x7f) << 16 | (code == OTHER ? 0 : base - (code << 23));
    }
    *low = *(vec *)bits;
    *high = *(vec *)(bits + GROUP / 2);
#endif
}

#endif
