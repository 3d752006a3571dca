/* Rows of tables in C: what native.c and updates.c share. Tables are float32, bfloat16, or codes of eight bits with a
   scale per row (eight_bit.py says which); all else is float32. */

#ifndef ROWS_H
#define ROWS_H

#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef uint16_t bf16;
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias)); /* at any address */
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef bf16 u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef int8_t i8;
typedef uint8_t e4m3; /* the bits of float8_e4m3fn, NaN never among them */
typedef i8 i8x16 __attribute__((vector_size(16), aligned(1), may_alias));

#define AHEAD 8       /* rows */
#define MOST_LINES 32 /* of one row; the hardware follows long rows by itself */
#define PASTE(a, b) a##b

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

/* Into L2: L1 has too few misses in flight. */
static inline void fetch(const void *row, i64 bytes) {
  i64 lines = smaller((bytes + 63) / 64, MOST_LINES);
  for (i64 i = 0; i < lines; i++) __builtin_prefetch((const char *)row + 64 * i, 0, 2);
}

static inline float total(v16 v) {
  float each[16], sum = 0;
  memcpy(each, &v, sizeof v);
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < 16; i++) sum += each[i];
  return sum;
}

static inline v16 load_f32(const float *from) { return *(const v16 *)from; }
static inline void store_f32(float *to, v16 v) { *(v16 *)to = v; }
static inline float get_f32(float x) { return x; }
static inline float put_f32(float x) { return x; }

static inline v16 load_bf16(const bf16 *from) {
  u32x16 wide = __builtin_convertvector(*(const u16x16 *)from, u32x16) << 16;
  v16 out;
  memcpy(&out, &wide, sizeof out);
  return out;
}
static inline void store_bf16(bf16 *to, v16 v) { /* to the nearest, ties to even, as torch does */
  u32x16 bits;
  memcpy(&bits, &v, sizeof bits);
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (u32x16)(v != v);
  *(u16x16 *)to = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), u16x16);
}
static inline float get_bf16(bf16 x) {
  union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
  return u.value;
}
static inline bf16 put_bf16(float x) {
  union { float value; uint32_t bits; } u = {x};
  return x == x ? (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16 : 0x7fc0;
}

/* Codes as numbers, of which UNIT is one: those of e4m3 are read as float16 has them, whose exponents begin 2**8 lower. */
#define UNIT_i8 1.0f
#define UNIT_e4m3 256.0f
static inline v16 load_i8(const i8 *from) {
#if defined(__AVX512F__)
  return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
  i16x16 wider = __builtin_convertvector(*(const i8x16 *)from, i16x16); /* in two steps: compilers know these */
  return __builtin_convertvector(__builtin_convertvector(wider, i32x16), v16);
#endif
}
static inline float get_i8(i8 x) { return x; }

static inline float get_e4m3(e4m3 x) {
  uint32_t magnitude = x & 0x7f, below = magnitude < 8; /* no leading one: as if there was, and less it */
  union { uint32_t bits; float value; } u = {(magnitude << 20) + ((112 + below) << 23)}, one = {below * (113u << 23)};
  u.value -= one.value;
  u.bits |= (uint32_t)(x & 0x80) << 24;
  return u.value;
}
static inline v16 load_e4m3(const e4m3 *from) {
#if defined(__AVX512F__)
  __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
  return (v16)_mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__) && defined(__F16C__)
  __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
  half = _mm256_and_si256(half, _mm256_set1_epi16((short)0xbf80));
  __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  v16 value;
  memcpy(&value, parts, sizeof value);
  return value;
#else
  float each[16]; /* compilers make better vectors of this than of vectors wider than the machine's */
  v16 value;
  for (int i = 0; i < 16; i++) each[i] = get_e4m3(from[i]);
  memcpy(&value, each, sizeof value);
  return value;
#endif
}

/* Past the caches, where a line is written whole: it need not be read first. */
static inline void stream_f32(float *to, v16 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__SSE__)
  float lanes[16];
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < 16; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(lanes + i));
#else
  store_f32(to, v);
#endif
}
static inline void stream_bf16(bf16 *to, v16 v) { store_bf16(to, v); } /* half a line */

#endif
