/* The expert products on CPU: every picked row is read once, where it lies.

   Compiled once per machine by native.py and called with a range of tokens (or of experts) per thread, so no
   threading library is needed here. Rows lie at random in gigabytes: what costs time is waiting for memory, so
   each loop asks for the rows of a few picks ahead. Tables are float32 or bfloat16, all else is float32.

   This file includes itself once per table type. */

#ifndef ROW

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef uint16_t bf16;

enum { GELU, RELU, SILU };

#define AHEAD 8      /* picks */
#define MOST_LINES 32 /* of one row; the hardware follows long rows by itself */

static inline float from_float(float x) { return x; }

static inline float from_bf16(bf16 x) {
  union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
  return u.value;
}

static inline void fetch(const void *row, i64 bytes) {
  i64 lines = (bytes + 63) / 64;
  if (lines > MOST_LINES) lines = MOST_LINES;
  for (i64 i = 0; i < lines; i++) __builtin_prefetch((const char *)row + 64 * i, 0, 2); /* into L2: L1 has too few misses in flight */
}

static inline float activate(float a, int kind) {
  if (kind == GELU) return 0.5f * a * (1.0f + erff(a * 0.707106781f));
  if (kind == RELU) return a <= 0 ? 0 : a; /* lets NaN through */
  return a / (1.0f + expf(-a));
}

static inline float derivative(float a, int kind) {
  if (kind == GELU)
    return 0.5f * (1.0f + erff(a * 0.707106781f)) + a * 0.398942280f * expf(-0.5f * a * a);
  if (kind == RELU) return a <= 0 ? 0 : 1;
  float s = 1.0f / (1.0f + expf(-a));
  return s * (1.0f + a * (1.0f - s));
}

/* Gradients of both tables' rows: segment s holds the picks order[starts[s]] .. order[starts[s + 1] - 1], all of
   one expert, and is written to row rows[s] of the outputs. */
void table_grads(i64 s0, i64 s1, i64 dim, const float *dpre, const float *hidden, const float *x, const float *dy,
                 const i64 *token, const i64 *order, const i64 *starts, const i64 *rows, float *ddown, float *dup) {
  for (i64 s = s0; s < s1; s++) {
    float *restrict gd = ddown + rows[s] * dim, *restrict gu = dup + rows[s] * dim;
    for (i64 j = starts[s]; j < starts[s + 1]; j++) {
      i64 p = order[j];
      const float *restrict xt = x + token[p] * dim, *restrict yt = dy + token[p] * dim;
      float a = dpre[p], b = hidden[p];
      if (j == starts[s]) {
#pragma omp simd
        for (i64 i = 0; i < dim; i++) gd[i] = a * xt[i], gu[i] = b * yt[i];
      } else {
#pragma omp simd
        for (i64 i = 0; i < dim; i++) gd[i] += a * xt[i], gu[i] += b * yt[i];
      }
    }
  }
}

#define ROW float
#define LOAD from_float
#define NAME(f) f##_f32
#include "native.c"
#undef ROW
#undef LOAD
#undef NAME

#define ROW bf16
#define LOAD from_bf16
#define NAME(f) f##_bf16
#include "native.c"

#else

static inline float NAME(dot)(const float *restrict x, const ROW *restrict row, i64 dim) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < dim; i++) sum += x[i] * LOAD(row[i]);
  return sum;
}

static inline void NAME(add)(float *restrict y, float weight, const ROW *restrict row, i64 dim) {
#pragma omp simd
  for (i64 i = 0; i < dim; i++) y[i] += weight * LOAD(row[i]);
}

/* out[p] = x[t] . table[expert[p]] */
void NAME(dots)(i64 t0, i64 t1, i64 dim, const float *x, const i64 *offsets, const i64 *expert, const ROW *table,
                float *out) {
  i64 last = offsets[t1];
  for (i64 t = t0; t < t1; t++)
    for (i64 p = offsets[t]; p < offsets[t + 1]; p++) {
      if (p + AHEAD < last) fetch(table + expert[p + AHEAD] * dim, dim * sizeof(ROW));
      out[p] = NAME(dot)(x + t * dim, table + expert[p] * dim, dim);
    }
}

/* out[t] = sum over picks of weight[p] * table[expert[p]] */
void NAME(mix)(i64 t0, i64 t1, i64 dim, const float *weight, const i64 *offsets, const i64 *expert,
               const ROW *table, float *out) {
  i64 last = offsets[t1];
  for (i64 t = t0; t < t1; t++) {
    memset(out + t * dim, 0, dim * sizeof(float));
    for (i64 p = offsets[t]; p < offsets[t + 1]; p++) {
      if (p + AHEAD < last) fetch(table + expert[p + AHEAD] * dim, dim * sizeof(ROW));
      NAME(add)(out + t * dim, weight[p], table + expert[p] * dim, dim);
    }
  }
}

/* Both halves: pre[p] = x[t] . down[e],  y[t] = sum of act(pre[p]) * gate[p] * up[e] */
void NAME(forward)(i64 t0, i64 t1, i64 dim, const float *x, const i64 *offsets, const i64 *expert,
                   const float *gate, const ROW *down, const ROW *up, int kind, float *pre, float *y) {
  i64 last = offsets[t1];
  for (i64 t = t0; t < t1; t++) {
    memset(y + t * dim, 0, dim * sizeof(float));
    for (i64 p = offsets[t]; p < offsets[t + 1]; p++) {
      if (p + AHEAD < last) {
        fetch(down + expert[p + AHEAD] * dim, dim * sizeof(ROW));
        fetch(up + expert[p + AHEAD] * dim, dim * sizeof(ROW));
      }
      pre[p] = NAME(dot)(x + t * dim, down + expert[p] * dim, dim);
      NAME(add)(y + t * dim, activate(pre[p], kind) * gate[p], up + expert[p] * dim, dim);
    }
  }
}

/* Its mirror image for tokens and picks. */
void NAME(backward)(i64 t0, i64 t1, i64 dim, const float *dy, const i64 *offsets, const i64 *expert,
                    const float *pre, const float *gate, const ROW *down, const ROW *up, int kind, float *dx,
                    float *dgate, float *dpre, float *hidden) {
  i64 last = offsets[t1];
  for (i64 t = t0; t < t1; t++) {
    memset(dx + t * dim, 0, dim * sizeof(float));
    for (i64 p = offsets[t]; p < offsets[t + 1]; p++) {
      if (p + AHEAD < last) {
        fetch(up + expert[p + AHEAD] * dim, dim * sizeof(ROW));
        fetch(down + expert[p + AHEAD] * dim, dim * sizeof(ROW));
      }
      float dhidden = NAME(dot)(dy + t * dim, up + expert[p] * dim, dim), act = activate(pre[p], kind);
      dgate[p] = dhidden * act;
      dpre[p] = dhidden * gate[p] * derivative(pre[p], kind);
      hidden[p] = act * gate[p];
      NAME(add)(dx + t * dim, dpre[p], down + expert[p] * dim, dim);
    }
  }
}

#endif
