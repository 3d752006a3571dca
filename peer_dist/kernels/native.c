/* The expert products and the product-key search on CPU.

   Compiled once per machine by native.py, with OpenMP where the compiler has it: then its threads are torch's own, and
   do not wait for those to stop spinning. Every token (or row) is one thread's, so results do not depend on how many
   there are. Rows lie at random in gigabytes: what costs time is waiting for memory, so each loop asks for the rows of a
   few picks ahead. Tables are float32, bfloat16 or codes of eight bits, all else is float32.

   signatures.py says what each function takes, and checks it. This file includes itself once per table type. Only rows
   of codes have scales: what is written with the macros of SCALED is not there for the others. */

#ifndef ROW

#include "rows.h"

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { GELU, RELU, SILU };
enum { MOST_TOP_K = 64, HELD = 512 }; /* of the product-key search */

#define BLOCK 64     /* picks whose dot products are taken before their rows are added up */

static const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Work in parts of some thousands of picks: part p of a list of tokens (or segments) begins where this says. */
static inline i64 parts_of(i64 picks) { return 1 + smaller(picks / 4096, 511); }
static inline i64 begin_of(i64 part, i64 parts, const i64 *offsets, i64 count) {
  i64 low = 0, high = count, goal = offsets[count] / parts * part;
  if (part == parts) return count;
  while (low < high) {
    i64 middle = (low + high) / 2;
    if (offsets[middle] < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* exp, to 2 units in the last place; what would overflow or underflow is clamped. Branchless, for vectors. */
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = nearbyintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  union { int32_t bits; float value; } scale = {((int32_t)n + 127) * (1 << 23)};
  return p * scale.value;
}

/* erf by a rational function of least relative error on [0, 3.92], where float32 has reached 1. */
static inline float error_function(float x) {
  x = x < -3.92f ? -3.92f : x;
  x = x > 3.92f ? 3.92f : x;
  float s = x * x;
  float p = 1.12837915f + s * (0.190406544f + s * (0.0527487291f + s * (3.76561944e-3f + s * (2.84882657e-4f + s * 2.05008485e-6f))));
  float q = 1 + s * (0.502076147f + s * (0.11410914f + s * (0.0149692212f + s * (1.16253591e-3f + s * 3.80916867e-5f))));
  return x * p / q;
}

static void activate(i64 n, int kind, const float *pre, float *out) {
  if (kind == GELU)
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = 0.5f * pre[i] * (1 + error_function(pre[i] * 0.707106781f));
  else if (kind == RELU)
    for (i64 i = 0; i < n; i++) out[i] = pre[i] <= 0 ? 0 : pre[i]; /* lets NaN through */
  else
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = pre[i] / (1 + exponential(-pre[i]));
}

static void derivative(i64 n, int kind, const float *pre, float *out) {
  if (kind == GELU)
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
      float a = pre[i];
      out[i] = 0.5f * (1 + error_function(a * 0.707106781f)) + a * 0.398942280f * exponential(-0.5f * a * a);
    }
  else if (kind == RELU)
    for (i64 i = 0; i < n; i++) out[i] = pre[i] <= 0 ? 0 : 1;
  else
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
      float s = 1 / (1 + exponential(-pre[i]));
      out[i] = s * (1 + pre[i] * (1 - s));
    }
}

/* Append those of s[0 .. 15] that are not below `least`, NaN being above all, and where they are. */
static inline i64 collect(const float *s, int32_t at, float least, i64 held, float *value, int32_t *index) {
#if defined(__AVX512F__)
  __m512 v = _mm512_loadu_ps(s);
  __mmask16 in = _mm512_cmp_ps_mask(v, _mm512_set1_ps(least), _CMP_NLT_UQ);
  _mm512_storeu_ps(value + held, _mm512_maskz_compress_ps(in, v));
  _mm512_storeu_si512(index + held, _mm512_maskz_compress_epi32(in, _mm512_add_epi32((__m512i)lanes, _mm512_set1_epi32(at))));
  return held + __builtin_popcount(in);
#else
  for (int i = 0; i < 16; i++) value[held] = s[i], index[held] = at + i, held += !(s[i] < least);
  return held;
#endif
}

/* Leave the k largest of the held values, largest first, the earlier of equals first: each goes to the place that
   counting those before it gives. Without branches, so nothing is mispredicted. */
static i64 settle(i64 held, i64 k, float *value, int32_t *index) {
  int32_t key[HELD], place[HELD], old_index[HELD];
  float old_value[HELD];
  memcpy(old_value, value, held * sizeof *value);
  memcpy(old_index, index, held * sizeof *index);
#pragma omp simd
  for (i64 i = 0; i < held; i++) { /* integers in the order of the floats */
    union { float value; int32_t bits; } u = {value[i]};
    key[i] = u.value != u.value ? INT32_MAX : u.bits < 0 ? INT32_MIN - u.bits : u.bits;
  }
  for (i64 begin = 0; begin < held; begin += 16) {
    i32x16 mine, before = {};
    memcpy(&mine, key + begin, sizeof mine);
    i64 j = 0;
    for (; j < begin; j++) before -= key[j] >= mine;
    for (; j < smaller(begin + 16, held); j++) before -= (key[j] > mine) | ((key[j] == mine) & ((int32_t)(j - begin) < lanes));
    for (; j < held; j++) before -= key[j] > mine;
    memcpy(place + begin, &before, sizeof before);
  }
  for (i64 i = 0; i < held; i++) value[place[i]] = old_value[i], index[place[i]] = old_index[i];
  return smaller(held, k);
}

/* The k largest of s[0 .. n - 1] and where they are, largest first. `value` and `index` have room for HELD. */
static void largest(const float *s, i64 n, i64 k, float *value, int32_t *index) {
  float least = -INFINITY;
  i64 groups = (k + 15) / 16, vectors = n / 16, held = 0;
  if (vectors >= 4 * groups) { /* of 16 * groups >= k disjoint sets each has a member not below the least maximum */
    least = INFINITY;
    for (i64 g = 0; g < groups; g++) {
      float most[16];
      memcpy(most, s + 16 * g, sizeof most);
      for (i64 v = g + groups; v < vectors; v += groups)
#pragma omp simd
        for (int i = 0; i < 16; i++) most[i] = s[16 * v + i] > most[i] ? s[16 * v + i] : most[i];
      for (int i = 0; i < 16; i++) least = most[i] < least ? most[i] : least;
    }
  }
  for (i64 i = 0; i < n; i += 16) {
    float rest[16];
    const float *from = s + i;
    if (i + 16 > n) {
      for (i64 j = 0; j < 16; j++) rest[j] = i + j < n ? s[i + j] : -INFINITY;
      from = rest;
    }
    held = smaller(collect(from, i, least, held, value, index), held + n - i);
    if (held > HELD - 16) {
      held = settle(held, k, value, index);
      least = value[k - 1];
    }
  }
  settle(held, k, value, index);
}

/* Whether offsets do not ascend from 0 to the number of picks, or a pick is of no row. */
i64 wrong_picks(i64 tokens, i64 picks, i64 rows, const i64 *offsets, const i64 *expert) {
  int wrong = offsets[0] != 0 || offsets[tokens] != picks;
  for (i64 t = 0; t < tokens; t++) wrong |= offsets[t] > offsets[t + 1];
#pragma omp parallel for simd reduction(| : wrong) if (picks >= 1 << 16)
  for (i64 p = 0; p < picks; p++) wrong |= (uint64_t)expert[p] >= (uint64_t)rows;
  return wrong;
}

/* For each row the k largest sums first[a] + second[b], largest first, and their numbers a * n + b. A pair of the
   i-th and the j-th largest can be among them only if (i + 1)(j + 1) <= k: all of as small or smaller rank are no
   less. */
void top_pairs(i64 queries, i64 n, i64 k, const float *first, const float *second, i64 *number, float *score) {
  uint8_t i_of[HELD], j_of[HELD];
  i64 pairs = 0;
  for (i64 i = 0; i < k; i++)
    for (i64 j = 0; (i + 1) * (j + 1) <= k; j++, pairs++) i_of[pairs] = i, j_of[pairs] = j;
#pragma omp parallel for schedule(dynamic, 32)
  for (i64 r = 0; r < queries; r++) {
    float value[3][HELD], sum[HELD];
    int32_t index[3][HELD];
    largest(first + r * n, n, k, value[0], index[0]);
    largest(second + r * n, n, k, value[1], index[1]);
    for (i64 c = 0; c < pairs; c++) sum[c] = value[0][i_of[c]] + value[1][j_of[c]];
    largest(sum, pairs, k, value[2], index[2]);
    for (i64 c = 0; c < k; c++) {
      int32_t pair = index[2][c];
      score[r * k + c] = value[2][c];
      number[r * k + c] = index[0][i_of[pair]] * n + index[1][j_of[pair]];
    }
  }
}

/* Sort picks by expert, those of one expert by token. Place j of the order holds pick order[j], of token token[j];
   touched[s] is the s-th expert picked at all, whose places begin at starts[s]. `pairs` has room for twice the picks.
   Returns how many experts are touched. */
i64 group(i64 tokens, i64 rows, const i64 *offsets, const i64 *expert, uint64_t *pairs, int32_t *order, int32_t *token,
          i64 *touched, i64 *starts) {
  enum { BITS = 11, VALUES = 1 << BITS };
  i64 picks = offsets[tokens], segments = 0;
  uint64_t *from = pairs, *to = pairs + picks; /* expert << 32 | pick */
  for (i64 p = 0; p < picks; p++) from[p] = (uint64_t)expert[p] << 32 | (uint64_t)p;
  for (int shift = 32; (rows - 1) >> (shift - 32) > 0; shift += BITS) { /* stable, the lowest digits first */
    i64 place[VALUES] = {0}, begin = 0;
    for (i64 p = 0; p < picks; p++) place[from[p] >> shift & (VALUES - 1)]++;
    for (i64 v = 0; v < VALUES; v++) {
      i64 count = place[v];
      place[v] = begin, begin += count;
    }
    for (i64 p = 0; p < picks; p++) to[place[from[p] >> shift & (VALUES - 1)]++] = from[p];
    uint64_t *swapped = from;
    from = to, to = swapped;
  }
  int32_t *token_of = (int32_t *)to;
  for (i64 t = 0; t < tokens; t++)
    for (i64 p = offsets[t]; p < offsets[t + 1]; p++) token_of[p] = t;
  for (i64 j = 0; j < picks; j++) {
    i64 row = from[j] >> 32;
    order[j] = (int32_t)from[j], token[j] = token_of[order[j]];
    if (j == 0 || row != (i64)(from[j - 1] >> 32)) touched[segments] = row, starts[segments++] = j;
  }
  starts[segments] = picks;
  return segments;
}

#define ROW float
#define NAME(f) PASTE(f, _f32)
#include "native.c"
#undef ROW
#undef NAME

/* out[expert[p]] += weight[p] * x[t]. Every thread looks at all picks and adds those of its rows, in the order of the
   tokens: nothing needs sorting, for tables that stay in cache. */
void add_rows(i64 rows, i64 tokens, i64 dim, const float *weight, const float *x, const i64 *offsets,
              const i64 *expert, float *out) {
  i64 parts = 1;
#ifdef _OPENMP
  parts = omp_get_max_threads();
#endif
#pragma omp parallel for schedule(static)
  for (i64 part = 0; part < parts; part++) {
    i64 r0 = rows * part / parts, r1 = rows * (part + 1) / parts;
    for (i64 t = 0; t < tokens; t++)
      for (i64 p = offsets[t]; p < offsets[t + 1]; p++)
        if (expert[p] >= r0 && expert[p] < r1) add_f32(out + expert[p] * dim, weight[p], x + t * dim, dim);
  }
}

#define ROW bf16
#define NAME(f) PASTE(f, _bf16)
#include "native.c"
#undef ROW
#undef NAME

#define SCALED
#define ROW i8
#define NAME(f) PASTE(f, _i8)
#include "native.c"
#undef ROW
#undef NAME

#define ROW e4m3
#define NAME(f) PASTE(f, _e4m3)
#include "native.c"

#else

#undef SCALES
#undef GIVE
#undef TIMES
#undef FETCH
#ifdef SCALED
#define SCALES(scales) , const float *scales
#define GIVE(scales) , scales
#define TIMES(scales, row) * (NAME(UNIT) * scales[row])
#define FETCH(table, scales, row) (fetch(table + (row) * dim, dim * sizeof(ROW)), fetch(scales + (row), sizeof(float)))
#else
#define SCALES(scales)
#define GIVE(scales)
#define TIMES(scales, row)
#define FETCH(table, scales, row) fetch(table + (row) * dim, dim * sizeof(ROW))
#endif

static inline float NAME(dot)(const float *x, const ROW *row, i64 dim) {
  v16 a = {}, b = {}, c = {}, d = {};
  i64 i = 0;
  for (; i + 64 <= dim; i += 64) {
    a += load_f32(x + i) * NAME(load)(row + i);
    b += load_f32(x + i + 16) * NAME(load)(row + i + 16);
    c += load_f32(x + i + 32) * NAME(load)(row + i + 32);
    d += load_f32(x + i + 48) * NAME(load)(row + i + 48);
  }
  for (; i + 16 <= dim; i += 16) a += load_f32(x + i) * NAME(load)(row + i);
  float sum = total((a + b) + (c + d));
  for (; i < dim; i++) sum += x[i] * NAME(get)(row[i]);
  return sum;
}

static inline void NAME(add)(float *y, float weight, const ROW *row, i64 dim) {
  i64 i = 0;
  for (; i + 16 <= dim; i += 16) store_f32(y + i, load_f32(y + i) + weight * NAME(load)(row + i));
  for (; i < dim; i++) y[i] += weight * NAME(get)(row[i]);
}

/* out[p] = x . table[expert[p]] for the picks p0 .. p1 - 1 of one token, whose rows of `next` are added up after. */
static inline void NAME(dots_of)(i64 p0, i64 p1, i64 dim, const float *x, const i64 *expert, const ROW *table SCALES(scales),
                                 const ROW *next SCALES(next_scales), float *out) {
  for (i64 p = p0; p < p1; p++) {
    i64 ahead = p + AHEAD;
    if (ahead < p1) FETCH(table, scales, expert[ahead]);
    else if (ahead - (p1 - p0) < p1) FETCH(next, next_scales, expert[ahead - (p1 - p0)]);
    out[p - p0] = NAME(dot)(x, table + expert[p] * dim, dim) TIMES(scales, expert[p]);
  }
}

/* y += weight[p] * table[expert[p]]; then come the rows of `next` from pick p1 to `last`. */
static inline void NAME(mix_of)(i64 p0, i64 p1, i64 last, i64 dim, const float *weight, const i64 *expert,
                                const ROW *table SCALES(scales), const ROW *next SCALES(next_scales), float *y) {
  for (i64 p = p0; p < p1; p++) {
    i64 ahead = p + AHEAD;
    if (ahead < p1) FETCH(table, scales, expert[ahead]);
    else if (ahead < last) FETCH(next, next_scales, expert[ahead]);
    NAME(add)(y, weight[p - p0] TIMES(scales, expert[p]), table + expert[p] * dim, dim);
  }
}

/* out[p] = x[t] . table[expert[p]] */
void NAME(dots)(i64 tokens, i64 dim, const float *x, const i64 *offsets, const i64 *expert,
                const ROW *table SCALES(scales), float *out) {
  i64 parts = parts_of(offsets[tokens]);
#pragma omp parallel for schedule(dynamic)
  for (i64 part = 0; part < parts; part++) {
    i64 t0 = begin_of(part, parts, offsets, tokens), t1 = begin_of(part + 1, parts, offsets, tokens);
    i64 last = offsets[t1];
    for (i64 t = t0; t < t1; t++)
      for (i64 p = offsets[t]; p < offsets[t + 1]; p++) {
        if (p + AHEAD < last) FETCH(table, scales, expert[p + AHEAD]);
        out[p] = NAME(dot)(x + t * dim, table + expert[p] * dim, dim) TIMES(scales, expert[p]);
      }
  }
}

/* out[t] = sum over picks of weight[p] * table[expert[p]] */
void NAME(mix)(i64 tokens, i64 dim, const float *weight, const i64 *offsets, const i64 *expert,
               const ROW *table SCALES(scales), float *out) {
  i64 parts = parts_of(offsets[tokens]);
#pragma omp parallel for schedule(dynamic)
  for (i64 part = 0; part < parts; part++) {
    i64 t0 = begin_of(part, parts, offsets, tokens), t1 = begin_of(part + 1, parts, offsets, tokens);
    for (i64 t = t0; t < t1; t++) {
      memset(out + t * dim, 0, dim * sizeof(float));
      NAME(mix_of)(offsets[t], offsets[t + 1], offsets[t1], dim, weight + offsets[t], expert,
                   table GIVE(scales), table GIVE(scales), out + t * dim);
    }
  }
}

/* Both halves: pre[p] = x[t] . down[e],  y[t] = sum of act(pre[p]) * gate[p] * up[e] */
void NAME(forward)(i64 tokens, i64 dim, i64 kind, const float *x, const i64 *offsets, const i64 *expert,
                   const float *gate, const ROW *down SCALES(down_scales), const ROW *up SCALES(up_scales), float *pre,
                   float *y) {
  i64 parts = parts_of(offsets[tokens]);
#pragma omp parallel for schedule(dynamic)
  for (i64 part = 0; part < parts; part++) {
    i64 t0 = begin_of(part, parts, offsets, tokens), t1 = begin_of(part + 1, parts, offsets, tokens);
    float weight[BLOCK];
    for (i64 t = t0; t < t1; t++) {
      memset(y + t * dim, 0, dim * sizeof(float));
      for (i64 p = offsets[t]; p < offsets[t + 1]; p += BLOCK) {
        i64 end = smaller(p + BLOCK, offsets[t + 1]);
        NAME(dots_of)(p, end, dim, x + t * dim, expert, down GIVE(down_scales), up GIVE(up_scales), pre + p);
        activate(end - p, kind, pre + p, weight);
        for (i64 i = 0; i < end - p; i++) weight[i] *= gate[p + i];
        NAME(mix_of)(p, end, offsets[t1], dim, weight, expert, up GIVE(up_scales), down GIVE(down_scales),
                     y + t * dim);
      }
    }
  }
}

/* Its mirror image for tokens and picks. */
void NAME(backward)(i64 tokens, i64 dim, i64 kind, const float *dy, const i64 *offsets, const i64 *expert,
                    const float *pre, const float *gate, const ROW *down SCALES(down_scales),
                    const ROW *up SCALES(up_scales), float *dx, float *dgate,
                    float *dpre, float *hidden) {
  i64 parts = parts_of(offsets[tokens]);
#pragma omp parallel for schedule(dynamic)
  for (i64 part = 0; part < parts; part++) {
    i64 t0 = begin_of(part, parts, offsets, tokens), t1 = begin_of(part + 1, parts, offsets, tokens);
    float slope[BLOCK];
    for (i64 t = t0; t < t1; t++) {
      memset(dx + t * dim, 0, dim * sizeof(float));
      for (i64 p = offsets[t]; p < offsets[t + 1]; p += BLOCK) {
        i64 end = smaller(p + BLOCK, offsets[t + 1]);
        NAME(dots_of)(p, end, dim, dy + t * dim, expert, up GIVE(up_scales), down GIVE(down_scales), dpre + p);
        activate(end - p, kind, pre + p, hidden + p);
        derivative(end - p, kind, pre + p, slope);
        for (i64 i = p; i < end; i++) {
          dgate[i] = dpre[i] * hidden[i];
          dpre[i] *= gate[i] * slope[i - p];
          hidden[i] *= gate[i];
        }
        NAME(mix_of)(p, end, offsets[t1], dim, dpre + p, expert, down GIVE(down_scales), up GIVE(up_scales),
                     dx + t * dim);
      }
    }
  }
}

#ifndef SCALED
/* Gradients of a table's rows out of what `group` made: the sum of weight * x over the picks of segment s is written
   to row rows[s], or to row s without `rows`; or added to it, with `add`. */
void NAME(table_grad)(i64 segments, i64 dim, i64 stream, i64 add, const float *weight, const float *x, const int32_t *token,
                      const int32_t *order, const i64 *starts, const i64 *rows, ROW *out) {
  i64 parts = parts_of(starts[segments]);
#pragma omp parallel for schedule(dynamic)
  for (i64 part = 0; part < parts; part++) {
    i64 s0 = begin_of(part, parts, starts, segments), s1 = begin_of(part + 1, parts, starts, segments);
    i64 last = starts[s1];
    for (i64 s = s0; s < s1; s++) {
      ROW *to = out + (rows ? rows[s] : s) * dim;
      i64 begin = starts[s], end = starts[s + 1], i = 0;
      for (i64 j = begin + AHEAD; j < end + AHEAD && j < last; j++) fetch(x + token[j] * dim, dim * sizeof(float));
      int whole = stream && (uintptr_t)to % 64 == 0;
      for (; i + 64 <= dim; i += 64) {
        v16 a = {}, b = {}, c = {}, d = {};
        for (i64 j = begin; j < end; j++) {
          const float *from = x + token[j] * dim + i, w = weight[order[j]];
          a += w * load_f32(from), b += w * load_f32(from + 16);
          c += w * load_f32(from + 32), d += w * load_f32(from + 48);
        }
        if (add) {
          a = NAME(load)(to + i) + a, b = NAME(load)(to + i + 16) + b;
          c = NAME(load)(to + i + 32) + c, d = NAME(load)(to + i + 48) + d;
        }
        if (whole) {
          NAME(stream)(to + i, a), NAME(stream)(to + i + 16, b);
          NAME(stream)(to + i + 32, c), NAME(stream)(to + i + 48, d);
        } else {
          NAME(store)(to + i, a), NAME(store)(to + i + 16, b);
          NAME(store)(to + i + 32, c), NAME(store)(to + i + 48, d);
        }
      }
      for (; i + 16 <= dim; i += 16) {
        v16 sum = {};
        for (i64 j = begin; j < end; j++) sum += weight[order[j]] * load_f32(x + token[j] * dim + i);
        if (add) sum = NAME(load)(to + i) + sum;
        NAME(store)(to + i, sum);
      }
      for (; i < dim; i++) {
        float sum = 0;
        for (i64 j = begin; j < end; j++) sum += weight[order[j]] * x[token[j] * dim + i];
        to[i] = NAME(put)(add ? NAME(get)(to[i]) + sum : sum);
      }
    }
  }
}
#endif

#endif
