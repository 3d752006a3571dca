/* The step of a table's optimizer on CPU, each row read and written once: the definition is in updates.py.

   Compiled into the library of native.c. Every operation is rounded to float32 by itself, none is fused with another, so
   that the bits do not depend on vectors, on a row's length or on the machine, and are those of plain PyTorch. It is
   memory that costs time here. A row's sum of squares has one order, that of `squares_of`. */

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "rows.h"

#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* `numbers`, in the order of Step in updates.py */
enum { SCALE, DECAY, FIRST, REST_FIRST, SECOND, REST_SECOND, UNBIASED, EPS, RATE, MEAN };
/* float32 weights; these and their rounding; bfloat16 rounded at random; codes of eight bits rounded so */
enum { IN_PLACE, MASTER, STOCHASTIC, CODES };
enum { INT8, E4M3 }; /* of codes */
enum { ADAM, ROWWISE_ADAM, ROWWISE_ADAGRAD };
enum { PART = 1024, DRAWS = 4 }; /* columns that random bits are made for at a time, and columns that share a word */

INLINE float squares_of(int wide, const void *row, i64 dim) {
  const float *f32 = row;
  const bf16 *low = row;
  v16 sums[4] = {};
  i64 i = 0;
  for (; i + 64 <= dim; i += 64)
    for (int k = 0; k < 4; k++) {
      v16 g = wide ? load_f32(f32 + i + 16 * k) : load_bf16(low + i + 16 * k);
      sums[k] += g * g;
    }
  for (; i < dim; i += 16) {
    float rest[16] = {};
    for (i64 k = 0; k < 16 && i + k < dim; k++) rest[k] = wide ? f32[i + k] : get_bf16(low[i + k]);
    v16 g = load_f32(rest);
    sums[0] += g * g;
  }
  v16 halves = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float each[16], sum = 0;
  memcpy(each, &halves, sizeof each);
  for (int k = 0; k < 16; k++) sum += each[k];
  return sum;
}

/* out[r] = sum of the squares of row r */
void squares_f32(i64 rows, i64 dim, const float *grad, float *out) {
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < rows; r++) out[r] = squares_of(1, grad + r * dim, dim);
}
void squares_bf16(i64 rows, i64 dim, const bf16 *grad, float *out) {
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < rows; r++) out[r] = squares_of(0, grad + r * dim, dim);
}

/* SplitMix64 of counters that follow one another: rounding.py. */
static inline void draw(uint64_t key, uint64_t counter, i64 words, uint64_t *out) {
#pragma omp simd
  for (i64 i = 0; i < words; i++) {
    uint64_t word = (counter + (uint64_t)i) * 0x9E3779B97F4A7C15 + key;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    out[i] = word ^ word >> 31;
  }
}

static inline bf16 put_at_random(float x, uint32_t draw) {
  union { float value; uint32_t bits; } u = {x};
  return x == x ? (u.bits + draw) >> 16 : 0x7fc0;
}

INLINE void step_row(int way, int kind, i64 dim, const float *number, const void *grad, float *restrict weight,
                     bf16 *restrict table, float *restrict exp_avg, float *restrict exp_avg_sq, float factor,
                     const bf16 *restrict draws) {
  const float scale = number[SCALE], decay = number[DECAY], first = number[FIRST], rest_first = number[REST_FIRST];
  const float second = number[SECOND], rest_second = number[REST_SECOND], unbiased = number[UNBIASED];
  const float eps = number[EPS], rate = number[RATE];
  const float *restrict f32 = grad;
  const bf16 *restrict low = grad;
#pragma omp simd
  for (i64 i = 0; i < dim; i++) {
    float g = scale * (way == IN_PLACE ? f32[i] : get_bf16(low[i])), change = factor;
    if (kind == ADAM) {
      float square = second * exp_avg_sq[i] + rest_second * g * g;
      exp_avg_sq[i] = square;
      change = rate / (sqrtf(unbiased * square) + eps);
    }
    if (kind != ROWWISE_ADAGRAD) g = exp_avg[i] = first * exp_avg[i] + rest_first * g;
    float w = decay * (way == STOCHASTIC ? get_bf16(table[i]) : weight[i]) - change * g;
    if (way != STOCHASTIC) weight[i] = w;
    if (way == MASTER || way == STOCHASTIC) table[i] = way == MASTER ? put_bf16(w) : put_at_random(w, draws[i]);
  }
}

/* The bits for `count` columns of a row from `column` on, of that number, both in the whole table. */
static inline const bf16 *draws_of(uint64_t key, i64 number, i64 column, i64 count, bf16 *drawn) {
  uint64_t words[PART / DRAWS + 1];
  i64 begin = column / DRAWS, end = (column + count + DRAWS - 1) / DRAWS;
  draw(key, ((uint64_t)number << 32) + (uint64_t)begin, end - begin, words);
  memcpy(drawn, words, (end - begin) * sizeof *words);
  return drawn + column % DRAWS;
}

INLINE void read_codes(int format, i64 dim, const void *codes, float scale, float *restrict weight) {
  const i8 *small = codes;
  const e4m3 *floats = codes;
#pragma omp simd
  for (i64 i = 0; i < dim; i++) weight[i] = scale * (format == INT8 ? get_i8(small[i]) : UNIT_e4m3 * get_e4m3(floats[i]));
}

/* The scale of a row: eight_bit.py says which. */
static float scale_of(int format, i64 dim, const float *restrict weight) {
  const float largest = format == INT8 ? 127 : 448;
  uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (i64 i = 0; i < dim; i++) {
    union { float value; uint32_t bits; } u = {weight[i]};
    u.bits &= 0x7fffffff; /* in the order of the magnitudes, NaN above all */
    bits = u.bits > bits ? u.bits : bits;
  }
  union { uint32_t bits; float value; } most = {bits};
  if (bits >= 0x7f800000) return NAN;
  if (bits == 0) return 0.5f;
  int exponent;
  frexpf((most.value < 0x1p-100f ? 0x1p-100f : most.value) / largest, &exponent);
  if (exponent <= -100) return ldexpf(1, -100);
  float half = ldexpf(1, exponent - 1);
  return half * largest >= most.value ? half : 2 * half;
}

/* Every product here is by a power of two, and exact. */
INLINE void write_codes(int format, i64 dim, const float *restrict weight, float scale, const bf16 *restrict draws,
                        void *codes) {
  i8 *restrict small = codes;
  e4m3 *restrict floats = codes;
  const float inverse = 1 / scale;
#pragma omp simd
  for (i64 i = 0; i < dim; i++) {
    union { float value; uint32_t bits; } scaled = {weight[i] * inverse}, magnitude = scaled, per_step;
    magnitude.bits &= 0x7fffffff;
    float share = draws[i] * 0x1p-16f;
    if (format == INT8) {
      int32_t places = (int32_t)(magnitude.value + share);
      small[i] = scaled.bits >> 31 ? -places : places;
    } else { /* steps of an eighth of the leading one, as of 2**-6 below it */
      uint32_t exponent = magnitude.bits >> 23;
      exponent = exponent < 121 ? 121 : exponent;
      per_step.bits = (257 - exponent) << 23;
      int32_t places = (int32_t)(magnitude.value * per_step.value + share);
      floats[i] = (scaled.bits >> 31) << 7 | (((exponent - 121) << 3) + (uint32_t)places);
    }
  }
}

/* Whether rows do not ascend, each once, or lead out of the table. */
static i64 wrong_rows(i64 touched, i64 rows, const i64 *row) {
  int wrong = touched > 0 && (row[0] < 0 || row[touched - 1] >= rows);
  for (i64 t = 1; t < touched; t++) wrong |= row[t] <= row[t - 1];
  return wrong;
}

static i64 update(int way, i64 touched, i64 rows, i64 dim, const float *number, const void *grad, const i64 *row,
                  const float *squares, float *weight, bf16 *table, float *exp_avg, float *exp_avg_sq, float *row_sq,
                  const i64 *place, const i64 *called, int format, uint8_t *codes, float *scales) {
  if (row && wrong_rows(touched, rows, row)) return 1;
  float *room = 0; /* for a row of each thread's: between its passes it stays in cache */
  if (way == CODES) {
    size_t threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    room = malloc(threads * (dim + 16) * sizeof *room);
    if (!room) return 2;
  }
  const int kind = !exp_avg ? ROWWISE_ADAGRAD : exp_avg_sq ? ADAM : ROWWISE_ADAM;
#pragma omp parallel for schedule(static)
  for (i64 t = 0; t < touched; t++) {
    i64 r = row ? row[t] : t;
    const char *g = (const char *)grad + t * dim * (way == IN_PLACE ? sizeof(float) : sizeof(bf16));
    if (row && t + 1 < touched) {
      i64 next = row[t + 1] * dim;
      if (weight) fetch(weight + next, dim * sizeof(float));
      if (table) fetch(table + next, dim * sizeof(bf16));
      if (codes) fetch(codes + next, dim), fetch(scales + row[t + 1], sizeof *scales);
      if (exp_avg) fetch(exp_avg + next, dim * sizeof(float));
      if (exp_avg_sq) fetch(exp_avg_sq + next, dim * sizeof(float));
    }
    float factor = 0;
    if (row_sq) {
      float sum = squares ? squares[t] : squares_of(way == IN_PLACE, g, dim);
      float mean = sum * number[SCALE] * number[MEAN];
      float square = row_sq[r] = number[SECOND] * row_sq[r] + number[REST_SECOND] * mean;
      factor = number[RATE] / (sqrtf(number[UNBIASED] * square) + number[EPS]);
    }
    const i64 named = place ? place[1] + (called ? called[t] : r) : 0;
    float *decoded = room;
#ifdef _OPENMP
    if (room) decoded += omp_get_thread_num() * (dim + 16);
#endif
    if (codes && format == INT8) read_codes(INT8, dim, codes + r * dim, scales[r], decoded);
    else if (codes) read_codes(E4M3, dim, codes + r * dim, scales[r], decoded);
    for (i64 i = 0; i < dim; i += PART) {
      i64 at = r * dim + i, count = smaller(PART, dim - i);
      bf16 drawn[PART + 2 * DRAWS];
      const bf16 *draws = way == STOCHASTIC ? draws_of((uint64_t)place[0], named, place[2] + i, count, drawn) : drawn;
      const char *from = g + i * (way == IN_PLACE ? sizeof(float) : sizeof(bf16));
#define AT(tensor) (tensor ? tensor + at : 0)
#define STEP(way, kind) \
  case 3 * way + kind: \
    step_row(way, kind, count, number, from, way == CODES ? decoded + i : AT(weight), AT(table), AT(exp_avg), \
             AT(exp_avg_sq), factor, draws); \
    break;
      switch (3 * way + kind) {
        STEP(IN_PLACE, ADAM) STEP(IN_PLACE, ROWWISE_ADAM) STEP(IN_PLACE, ROWWISE_ADAGRAD)
        STEP(MASTER, ADAM) STEP(MASTER, ROWWISE_ADAM) STEP(MASTER, ROWWISE_ADAGRAD)
        STEP(STOCHASTIC, ADAM) STEP(STOCHASTIC, ROWWISE_ADAM) STEP(STOCHASTIC, ROWWISE_ADAGRAD)
        STEP(CODES, ADAM) STEP(CODES, ROWWISE_ADAM) STEP(CODES, ROWWISE_ADAGRAD)
      }
    }
    if (!codes) continue;
    const float new_scale = scales[r] = scale_of(format, dim, decoded);
    if (new_scale != new_scale) memset(codes + r * dim, 0, dim);
    else for (i64 i = 0; i < dim; i += PART) {
      i64 count = smaller(PART, dim - i);
      bf16 drawn[PART + 2 * DRAWS];
      const bf16 *draws = draws_of((uint64_t)place[0], named, place[2] + i, count, drawn);
      if (format == INT8) write_codes(INT8, count, decoded + i, new_scale, draws, codes + r * dim + i);
      else write_codes(E4M3, count, decoded + i, new_scale, draws, codes + r * dim + i);
    }
  }
  free(room);
  return 0;
}

/* Step rows row[0 .. touched - 1], or all without `row`; if these are wrong, none, and return 1. Without `squares` a
   row's sum of squares is taken here. */
i64 update_in_place(i64 touched, i64 rows, i64 dim, const float *numbers, const float *grad, const i64 *row,
                    const float *squares, float *weight, float *exp_avg, float *exp_avg_sq, float *row_sq) {
  return update(IN_PLACE, touched, rows, dim, numbers, grad, row, squares, weight, 0, exp_avg, exp_avg_sq, row_sq, 0, 0,
                0, 0, 0);
}

/* The same, and `table` gets the rounding of `weight`. */
i64 update_master(i64 touched, i64 rows, i64 dim, const float *numbers, const bf16 *grad, const i64 *row,
                  const float *squares, float *weight, bf16 *table, float *exp_avg, float *exp_avg_sq, float *row_sq) {
  return update(MASTER, touched, rows, dim, numbers, grad, row, squares, weight, table, exp_avg, exp_avg_sq, row_sq, 0, 0,
                0, 0, 0);
}

/* The same without float32 weights; `place`: the key of the random bits, and where the table begins in the whole one;
   `called`: what the rows are numbered for these bits, where that is not what they are here. */
i64 update_stochastic(i64 touched, i64 rows, i64 dim, const float *numbers, const i64 *place, const i64 *called,
                      const bf16 *grad, const i64 *row, const float *squares, bf16 *table, float *exp_avg,
                      float *exp_avg_sq, float *row_sq) {
  return update(STOCHASTIC, touched, rows, dim, numbers, grad, row, squares, 0, table, exp_avg, exp_avg_sq, row_sq,
                place, called, 0, 0, 0);
}

/* The same of codes, whose rows get new `scales`; 2 if there is no memory for it. */
#define UPDATE_CODES(name, code, format) \
  i64 name(i64 touched, i64 rows, i64 dim, const float *numbers, const i64 *place, const i64 *called, \
           const bf16 *grad, const i64 *row, const float *squares, code *table, float *scales, float *exp_avg, \
           float *exp_avg_sq, float *row_sq) { \
    return update(CODES, touched, rows, dim, numbers, grad, row, squares, 0, 0, exp_avg, exp_avg_sq, row_sq, place, \
                  called, format, (uint8_t *)table, scales); \
  }
UPDATE_CODES(update_i8, i8, INT8)
UPDATE_CODES(update_e4m3, e4m3, E4M3)
