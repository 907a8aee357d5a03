/* What a CPU does in torch with several passes over memory, in one. A token costs little beyond reading the weights once. Built by native.py where a C compiler is found;
 * everything here has a torch implementation that computes the same.
 *
 * linear      y = W x for few rows of x: the weights are read from memory once, however many rows there are
 * rms_norm    the norm before every mixer; gated_rms_norm, the one at a Mamba-2 mixer's end
 * causal_conv the convolution of a Mamba-2 mixer, of any number of positions
 * mamba_step  a Mamba-2 mixer between its two projections, for a few tokens, states read and updated once, in place
 * attend      grouped-query attention of the last few positions over keys and values, both read once
 * blocks      several layers one after the other, for a few tokens: where a model is small, each call from outside counts
 *
 * Everything accumulates in float32. Vectors are 8 floats wide (GCC and Clang vector extensions; any instruction set).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Vectors that may lie at any address of their elements' alignment, over memory of any type. */
#define VECTOR(TYPE, BYTES) TYPE __attribute__((vector_size(BYTES), aligned(sizeof(TYPE)), may_alias))
typedef VECTOR(float, 32) v8f;
typedef VECTOR(int32_t, 32) v8i;
typedef VECTOR(int16_t, 32) v16s;
typedef VECTOR(uint16_t, 32) v16u;
typedef uint32_t v8u __attribute__((vector_size(32), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

/* Products below which waking other threads costs more than they save. */
#define WORTH_THREADS 400000

enum { F32 = 0, BF16 = 1, Q8 = 2, Q4 = 3 };

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to nearest even; a NaN stays one. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float load(const void *x, int type, int64_t i) {
    return type == BF16 ? from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void store(void *y, int type, int64_t i, float value) {
    if (type == BF16) ((uint16_t *)y)[i] = to_bf16(value);
    else ((float *)y)[i] = value;
}

INLINE float total(v8f v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
/* As many floats as the processor adds in one instruction, where it matters. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 16
#define TOGETHER 8 /* tokens whose sums fit in registers */
typedef VECTOR(float, 64) wide;
typedef VECTOR(int32_t, 64) wide_int;
typedef uint32_t wide_bits __attribute__((vector_size(64), aligned(2), may_alias));
INLINE float wide_total(wide v) {
    return total((v8f){v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]} + (v8f){v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]});
}
#else
#define WIDE 8
#define TOGETHER 4
typedef v8f wide;
typedef v8i wide_int;
typedef v8u wide_bits;
INLINE float wide_total(wide v) { return total(v); }
#endif
INLINE v8f splat(float s) { return (v8f){s, s, s, s, s, s, s, s}; }

/* Eight numbers at any address. */
typedef uint16_t v8h __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t v8w __attribute__((vector_size(32)));

INLINE v8f load8(const void *x, int type, int64_t i) {
    if (type == F32) return *(const v8f *)((const float *)x + i);
    return (v8f)(__builtin_convertvector(*(const v8h *)((const uint16_t *)x + i), v8w) << 16);
}

INLINE void store8(void *y, int type, int64_t i, v8f value) {
    if (type == F32) {
        *(v8f *)((float *)y + i) = value;
        return;
    }
    const v8w bits = (v8w)value, nan = (v8w)(value != value);
    const v8w rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | ((bits | (64 << 16)) & nan);
    *(v8h *)((uint16_t *)y + i) = __builtin_convertvector(rounded >> 16, v8h);
}

/* The first n of eight numbers, the others 0; and as many back. */
INLINE v8f load_some(const void *x, int type, int64_t i, int64_t n) {
    if (n >= 8) return load8(x, type, i);
    v8f value = splat(0);
    for (int64_t j = 0; j < n; j++) value[j] = load(x, type, i + j);
    return value;
}

INLINE void store_some(void *y, int type, int64_t i, v8f value, int64_t n) {
    if (n >= 8) store8(y, type, i, value);
    else
        for (int64_t j = 0; j < n; j++) store(y, type, i + j, value[j]);
}

/* What `type` holds of them. */
INLINE v8f rounded8(v8f value, int type) {
    uint16_t half[8];
    if (type == F32) return value;
    store8(half, type, 0, value);
    return load8(half, type, 0);
}

/* e^x to 2 units in the last place; beyond -87 and 88 as for those; NaN stays. */
INLINE v8f exponential(v8f x) {
    const v8i low = (v8i)(x < splat(-87)), high = (v8i)(x > splat(88));
    x = (v8f)(((v8i)splat(-87) & low) | ((v8i)splat(88) & high) | ((v8i)x & ~(low | high)));
    const v8f shifted = x * splat(1.44269504f) + splat(12582912); /* 1.5 * 2^23: the integer is in the low bits */
    const v8f n = shifted - splat(12582912), r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    v8f e = splat(1.9875691500e-4f);
    e = e * r + splat(1.3981999507e-3f);
    e = e * r + splat(8.3334519073e-3f);
    e = e * r + splat(4.1665795894e-2f);
    e = e * r + splat(1.6666665459e-1f);
    e = e * r + splat(5.0000001201e-1f);
    e = e * r * r + r + splat(1);
    return e * (v8f)(((v8i)shifted - 0x4b400000 + 127) << 23);
}

INLINE float silu(float x) { return x / (1 + expf(-x)); }
INLINE v8f silu8(v8f x) { return x / (splat(1) + exponential(-x)); }

/* ---------------------------------------------------------------------------------------------------------- linear */

/* `sum` and eight sums of two products each, of sixteen signed 16-bit numbers. */
INLINE v8i add_products(v8i sum, v16s a, v16s b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (v8i)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (v8i)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < 8; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

/* 32 int8 as 16-bit numbers, and `sum` with their products with 32 others in it. */
#if WIDE == 16
typedef __m512i Widened;
INLINE Widened widen(const int8_t *w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w)); }
INLINE wide_int add_all(wide_int sum, Widened w, const int16_t *x) {
#ifdef __AVX512VNNI__
    return (wide_int)_mm512_dpwssd_epi32((__m512i)sum, w, _mm512_loadu_si512(x));
#else
    return sum + (wide_int)_mm512_madd_epi16(w, _mm512_loadu_si512(x));
#endif
}
#else
typedef struct {
    v16s low, high;
} Widened;
INLINE v16s widen16(const int8_t *w) {
#ifdef __AVX2__
    return (v16s)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
#else
    v16s all;
    for (int i = 0; i < 16; i++) all[i] = w[i];
    return all;
#endif
}
INLINE Widened widen(const int8_t *w) { return (Widened){widen16(w), widen16(w + 16)}; }
INLINE wide_int add_all(wide_int sum, Widened w, const int16_t *x) {
    return add_products(add_products(sum, w.low, *(const v16s *)x), w.high, *(const v16s *)(x + 16));
}
#endif

/* 64 int4 are 16 lanes of 16 bits, input 16 t + lane the nibble at bit 4 t; so 32 of them, with the inputs they meet. */
INLINE v8f halves(v16u word, const v16s *x, int half) {
    const v16u first = half ? word >> 8 : word, second = half ? word >> 12 : word >> 4;
    const v8i sum = add_products((v8i){0}, (v16s)(first & 15), x[2 * half]);
    return __builtin_convertvector(add_products(sum, (v16s)(second & 15), x[2 * half + 1]), v8f);
}

/* Rows of x as the kernels read them, zero-padded to `padded` inputs. For float32 weights as they are; for bfloat16
 * even and odd inputs apart, since a 32-bit lane holds a pair of weights. Quantised weights meet x as 16-bit integers
 * with a scale for each 32 inputs, or `EIGHTS` where they are int8: half a unit of 2^-15 of the largest of them, where
 * bfloat16 itself rounds each to 2^-9 of its size. */
#define EIGHTS 128
typedef struct {
    float *plain;    /* (M, padded) */
    int16_t *fixed;  /* (M, padded) */
    float *unit;     /* (M, padded / 32) what one of `fixed` stands for */
    float *offset;   /* (M, padded / 32) int4: -8 times the sum of each 32 inputs */
} Rows;

static void arrange(const void *x, int xtype, int wtype, int64_t K, int64_t padded, int64_t m, Rows rows) {
    if (wtype == F32 || wtype == BF16) {
        float *out = rows.plain + m * padded;
        for (int64_t k = 0; k < padded; k += 2 * WIDE)
            for (int i = 0; i < 2 * WIDE; i++) {
                const int64_t from = k + (wtype == BF16 ? 2 * (i % WIDE) + i / WIDE : i);
                out[k + i] = from < K ? load(x, xtype, m * K + from) : 0;
            }
        return;
    }
    const int64_t together = wtype == Q8 ? EIGHTS : 32;
    for (int64_t k = 0; k < padded; k += together) {
        const int64_t count = padded - k < together ? padded - k : together;
        float in[EIGHTS], largest = 0, carried = 0;
        for (int i = 0; i < count; i++) {
            in[i] = k + i < K ? load(x, xtype, m * K + k + i) : 0;
            largest = fmaxf(largest, fabsf(in[i]));
            carried += in[i] * 0; /* NaN where an input is NaN or infinite, which integers cannot say */
        }
        const int usable = largest > 0x1p-100f && carried == 0;
        const float unit = usable ? largest / 32767 : carried, inverse = usable ? 32767 / largest : 0;
        for (int from = 0; from < count; from += 32) {
            int32_t sum = 0;
            for (int i = from; i < from + 32; i++) {
                const int32_t value = usable ? (int32_t)rintf(in[i] * inverse) : 0;
                rows.fixed[m * padded + k + i] = (int16_t)value;
                sum += value;
            }
            rows.unit[m * (padded / 32) + (k + from) / 32] = unit;
            rows.offset[m * (padded / 32) + (k + from) / 32] = -8 * unit * (float)sum;
        }
    }
}

/* `dots` of int4. */
INLINE void dots4(int R, int M, const void *w, const uint16_t *scale, int64_t padded, Rows x, int64_t m, float out[4][TOGETHER]) {
    v8f acc[4][TOGETHER];
    const int64_t groups = padded / 32;
    const uint16_t *W = w;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) acc[r][i] = splat(0);
    const int16_t *in = x.fixed + m * padded;
    const float *unit = x.unit + m * groups, *offset = x.offset + m * groups;
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        v8f size[4][TOGETHER];
        for (int r = 0; r < R; r++) {
            float s[8];
            for (int j = 0; j < 8; j++) s[j] = from_bf16(scale[r * groups + g + j]);
            for (int i = 0; i < M; i++) {
                size[r][i] = *(v8f *)s * *(const v8f *)(unit + i * groups + g);
                acc[r][i] += *(v8f *)s * *(const v8f *)(offset + i * groups + g);
            }
        }
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; pair++)
            for (int r = 0; r < R; r++) {
                const uint16_t *at = W + r * (padded / 4) + 8 * g + 16 * pair;
                if (pair % 2 == 0) __builtin_prefetch((const char *)at + R * (padded / 2));
                const v16u word = *(const v16u *)at;
                for (int i = 0; i < M; i++) {
                    const v16s *v = (const v16s *)(in + i * padded + 32 * g + 64 * pair);
                    acc[r][i] += halves(word, v, 0) * splat(size[r][i][2 * pair]);
                    acc[r][i] += halves(word, v, 1) * splat(size[r][i][2 * pair + 1]);
                }
            }
    }
    for (; g < groups; g += 2)
        for (int r = 0; r < R; r++) {
            const v16u word = *(const v16u *)(W + r * (padded / 4) + 8 * g);
            for (int i = 0; i < M; i++)
                for (int half = 0; half < 2; half++) {
                    const v16s *v = (const v16s *)(in + i * padded + 32 * g);
                    const float s = from_bf16(scale[r * groups + g + half]);
                    acc[r][i] += halves(word, v, half) * splat(s * unit[i * groups + g + half]);
                    acc[r][i][0] += s * offset[i * groups + g + half];
                }
        }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) out[r][i] = total(acc[r][i]);
}

/* R rows of weights with M rows of x from row `m` on: out[r][i] = sum_k W[r][k] x[m + i][k], added up in the same order
 * whatever R and M. These and the types are constants where this is inlined. */
INLINE void dots(int wtype, int R, int M, const void *w, const uint16_t *scale, int64_t K, int64_t padded, Rows x, int64_t m,
                 float out[4][TOGETHER]) {
    wide acc[4][TOGETHER];
    const int64_t groups = padded / 32;
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) acc[r][i] = (wide){0};
    if (wtype == F32) {
        const float *W = w, *in = x.plain + m * padded;
        int64_t k = 0;
        for (; k + WIDE <= K; k += WIDE)
            for (int r = 0; r < R; r++) {
                const wide a = *(const wide *)(W + r * K + k);
                for (int i = 0; i < M; i++) acc[r][i] += a * *(const wide *)(in + i * padded + k);
            }
        for (; k < K; k++)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < M; i++) acc[r][i][0] += W[r * K + k] * in[i * padded + k];
    } else if (wtype == BF16) {
        const uint16_t *W = w;
        const float *in = x.plain + m * padded;
        int64_t k = 0;
        for (; k + 2 * WIDE <= K; k += 2 * WIDE) {
            wide even[4], odd[4];
            for (int r = 0; r < R; r++) {
                __builtin_prefetch(W + (R + r) * K + k); /* the next rows: the hardware stops at a page's end */
                const wide_bits pair = *(const wide_bits *)(W + r * K + k);
                even[r] = (wide)(pair << 16);
                odd[r] = (wide)(pair & 0xffff0000u);
            }
            for (int i = 0; i < M; i++) {
                const wide first = *(const wide *)(in + i * padded + k), second = *(const wide *)(in + i * padded + k + WIDE);
                for (int r = 0; r < R; r++) acc[r][i] += even[r] * first;
                for (int r = 0; r < R; r++) acc[r][i] += odd[r] * second;
            }
        }
        for (int j = 0; k + j < K; j++)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < M; i++)
                    acc[r][i][0] += from_bf16(W[r * K + k + j]) * in[i * padded + k + j / 2 + WIDE * (j % 2)];
    } else if (wtype == Q8) {
        const int8_t *W = w;
        const int16_t *in = x.fixed + m * padded;
        const float *unit = x.unit + m * groups;
        int64_t k = 0;
        for (; k + EIGHTS <= K; k += EIGHTS)
            for (int r = 0; r < R; r++) {
                const int8_t *at = W + r * K + k;
                __builtin_prefetch(at + R * K);
                __builtin_prefetch(at + R * K + 64);
                const Widened a = widen(at), b = widen(at + 32), c = widen(at + 64), d = widen(at + 96);
                for (int i = 0; i < M; i++) {
                    const int16_t *v = in + i * padded + k;
                    const wide_int sum = add_all(add_all(add_all(add_all((wide_int){0}, a, v), b, v + 32), c, v + 64), d, v + 96);
                    acc[r][i] += __builtin_convertvector(sum, wide) * unit[i * groups + k / 32];
                }
            }
        for (; k + 32 <= K; k += 32)
            for (int r = 0; r < R; r++) {
                const Widened some = widen(W + r * K + k);
                for (int i = 0; i < M; i++) {
                    const wide_int sum = add_all((wide_int){0}, some, in + i * padded + k);
                    acc[r][i] += __builtin_convertvector(sum, wide) * unit[i * groups + k / 32];
                }
            }
        for (; k < K; k++)
            for (int r = 0; r < R; r++)
                for (int i = 0; i < M; i++) acc[r][i][0] += W[r * K + k] * in[i * padded + k] * unit[i * groups + k / 32];
    } else {
        dots4(R, M, w, scale, padded, x, m, out);
        return;
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) out[r][i] = wide_total(acc[r][i]);
}

typedef struct {
    const char *weight;
    const float *row_scale;  /* int8 */
    const uint16_t *scale;   /* int4 */
    int64_t N, K, padded, row_bytes;
    Rows x;
    char *y;
    int ytype;
} Linear;

INLINE void block(int wtype, int R, int M, Linear l, int64_t n, int64_t m) {
    float out[4][TOGETHER];
    dots(wtype, R, M, l.weight + n * l.row_bytes, l.scale ? l.scale + n * (l.padded / 32) : 0, l.K, l.padded, l.x, m, out);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++)
            store(l.y, l.ytype, (m + i) * l.N + n + r, l.row_scale ? out[r][i] * l.row_scale[n + r] : out[r][i]);
}

/* Rows n .. n + R of the weights with rows m .. end of x, at most `most` at a time, alike in number: from the second time
 * on out of the cache. */
INLINE void rows(int wtype, int R, int most, Linear l, int64_t n, int64_t m, int64_t end) {
    for (int64_t parts = (end - m + most - 1) / most; parts > 0; parts--) {
        const int64_t count = (end - m + parts - 1) / parts;
        if (count == 1) block(wtype, R, 1, l, n, m);
        else if (count == 2) block(wtype, R, 2, l, n, m);
        else if (count == 3) block(wtype, R, 3, l, n, m);
        else if (count == 4) block(wtype, R, 4, l, n, m);
        else block(wtype, R, most, l, n, m);
        m += count;
    }
}

/* Four rows of weights, or those that are left. As many sums at a time as fit in registers: 20 of 32, or
 * 8 of 16. */
INLINE void four(int wtype, Linear l, int64_t n, int64_t m, int64_t end) {
    const int many = WIDE == 16 && wtype != Q4;
    if (n + 4 > l.N)
        for (; n < l.N; n++) rows(wtype, 1, 4, l, n, m, end);
    else if (end - m == 1)
        block(wtype, 4, 1, l, n, m);
    else if (many)
        rows(wtype, 4, WIDE == 16 ? 5 : 4, l, n, m, end);
    else
        for (int64_t two = 0; two < 4; two += 2) rows(wtype, 2, 4, l, n + two, m, end);
}

/* y (M, N) = x (M, K) W^T, W (N, K); with `expert` (M,), row m meets W[expert[m]] of W (E, N, K), and rows that follow
 * each other with the same expert read its weights once.
 * scale: float32 (N,) for int8, bfloat16 (N, padded / 32) for int4, with a leading E where there are experts.
 * Returns 0, 1 where memory ran out, or 2 where a row's expert is none of the E. */
int nh_linear(int wtype, int xtype, const void *weight, const void *scale, const void *x, void *y, int64_t M, int64_t N,
              int64_t K, const int64_t *expert, int64_t E) {
    for (int64_t m = 0; expert && m < M; m++)
        if (expert[m] < 0 || expert[m] >= E) return 2;
    const int64_t padded = (K + 63) / 64 * 64, groups = padded / 32, steps = (N + 3) / 4;
    const int64_t row_bytes = wtype == F32 ? 4 * K : wtype == BF16 ? 2 * K : wtype == Q8 ? K : padded / 2;
    int64_t *starts = malloc(sizeof(int64_t) * (M + 1));
    float *memory = malloc(sizeof(float) * M * (padded + 2 * groups));
    if (!memory || !starts) {
        free(memory);
        free(starts);
        return 1;
    }
    int64_t runs = 0;
    for (int64_t m = 0; m < M; m++)
        if (m == 0 || (expert && expert[m] != expert[m - 1])) starts[runs++] = m;
    starts[runs] = M;
    const Rows in = {memory, (int16_t *)memory, memory + M * padded, memory + M * (padded + groups)};
#pragma omp parallel for if (M * K > WORTH_THREADS / 4)
    for (int64_t m = 0; m < M; m++) arrange(x, xtype, wtype, K, padded, m, in);
    /* Dynamic: a machine shared with others does not run its cores at one speed. */
#pragma omp parallel for schedule(dynamic, 16) if (M * N * K > WORTH_THREADS)
    for (int64_t task = 0; task < runs * steps; task++) {
        const int64_t m = starts[task / steps], end = starts[task / steps + 1], n = task % steps * 4, e = expert ? expert[m] : 0;
        const Linear l = {(const char *)weight + e * N * row_bytes,
                          wtype == Q8 ? (const float *)scale + e * N : 0,
                          wtype == Q4 ? (const uint16_t *)scale + e * N * groups : 0,
                          N, K, padded, row_bytes, in, y, xtype};
        if (wtype == F32) four(F32, l, n, m, end);
        else if (wtype == BF16) four(BF16, l, n, m, end);
        else if (wtype == Q8) four(Q8, l, n, m, end);
        else four(Q4, l, n, m, end);
    }
    free(memory);
    free(starts);
    return 0;
}

/* -------------------------------------------------------------------------------------------------------- rms_norm */

/* y (M, D) = weight x / sqrt(mean(x^2) + eps), all of one type. */
int nh_rms_norm(int type, const void *x, const void *weight, void *y, int64_t M, int64_t D, float eps) {
#pragma omp parallel for if (M * D > WORTH_THREADS / 8)
    for (int64_t m = 0; m < M; m++) {
        const int64_t from = m * D;
        v8f sums = splat(0);
        int64_t i = 0;
        for (; i + 8 <= D; i += 8) {
            const v8f value = load8(x, type, from + i);
            sums += value * value;
        }
        float squares = total(sums);
        for (; i < D; i++) squares += load(x, type, from + i) * load(x, type, from + i);
        const float norm = 1 / sqrtf(squares / D + eps);
        for (i = 0; i + 8 <= D; i += 8) store8(y, type, from + i, load8(weight, type, i) * (load8(x, type, from + i) * splat(norm)));
        for (; i < D; i++) store(y, type, from + i, load(weight, type, i) * (load(x, type, from + i) * norm));
    }
    return 0;
}

/* out (M, D) = weight RMSNorm(y silu(z)), each of `groups` parts of D by itself; rows of z lie `z_row` numbers apart. */
int nh_gated_rms_norm(int type, const void *y, const void *z, int64_t z_row, const void *weight, void *out, int64_t M, int64_t D,
                      int64_t groups, float eps) {
    const int64_t span = D / groups, together = 16, tasks = (M + together - 1) / together;
    int failed = 0;
#pragma omp parallel for if (M * D > WORTH_THREADS / 8) reduction(| : failed)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t end = (task + 1) * together < M ? (task + 1) * together : M;
        float *u = malloc(sizeof(float) * span);
        failed |= !u;
        for (int64_t m = task * together; u && m < end; m++)
            for (int64_t from = 0; from < D; from += span) {
                const int64_t at = m * D + from, gate = m * z_row + from;
                v8f sums = splat(0);
                int64_t i = 0;
                for (; i + 8 <= span; i += 8) {
                    const v8f value = load8(y, type, at + i) * silu8(load8(z, type, gate + i));
                    *(v8f *)(u + i) = value;
                    sums += value * value;
                }
                float squares = total(sums);
                for (; i < span; i++) {
                    u[i] = load(y, type, at + i) * silu(load(z, type, gate + i));
                    squares += u[i] * u[i];
                }
                const float norm = 1 / sqrtf(squares / span + eps);
                for (i = 0; i + 8 <= span; i += 8)
                    store8(out, type, at + i, load8(weight, type, from + i) * (*(v8f *)(u + i) * splat(norm)));
                for (; i < span; i++) store(out, type, at + i, load(weight, type, from + i) * (u[i] * norm));
            }
        free(u);
    }
    return failed;
}

/* ------------------------------------------------------------------------------------------------------ causal_conv */

/* y (B, L, C) = silu(bias + sum_k weight[k] x[l - W + k]), x before position 0 the window's (B, W, C), W = K - 1. Rows of x
 * lie `x_row` numbers apart, its batch rows `x_batch`; weight (K, C) and bias (C) are float32. A thread takes a stretch of
 * positions of a few hundred channels: what it reads again is in the first cache. */
int nh_causal_conv(int type, const void *x, int64_t x_batch, int64_t x_row, const void *window, const float *weight,
                   const float *bias, void *y, int64_t B, int64_t L, int64_t C, int64_t K) {
    const int64_t W = K - 1, wide = 512, longs = 128, across = (C + wide - 1) / wide, along = (L + longs - 1) / longs;
    const int64_t bytes = type == BF16 ? 2 : 4;
#pragma omp parallel for schedule(dynamic, 4) if (B * L * C > WORTH_THREADS / 8)
    for (int64_t task = 0; task < B * along * across; task++) {
        const int64_t c0 = task % across * wide, c1 = c0 + wide < C ? c0 + wide : C;
        const int64_t l0 = task / across % along * longs, l1 = l0 + longs < L ? l0 + longs : L, b = task / across / along;
        for (int64_t l = l0; l < l1; l++) {
            const char *row[8];
            for (int64_t k = 0; k < K; k++) {
                const int64_t at = l - W + k;
                row[k] = at >= 0 ? (const char *)x + bytes * (b * x_batch + at * x_row)
                                 : (const char *)window + bytes * ((b * W + at + W) * C);
            }
            int64_t c = c0;
            for (; c + 8 <= c1; c += 8) {
                v8f sum = *(const v8f *)(bias + c);
                for (int64_t k = 0; k < K; k++) sum += load8(row[k], type, c) * *(const v8f *)(weight + k * C + c);
                store8(y, type, (b * L + l) * C + c, silu8(sum));
            }
            for (; c < c1; c++) {
                float sum = bias[c];
                for (int64_t k = 0; k < K; k++) sum += load(row[k], type, c) * weight[k * C + c];
                store(y, type, (b * L + l) * C + c, silu(sum));
            }
        }
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ mamba_step */

typedef struct {
    int64_t heads, head_dim, groups, state, width; /* width: convolution kernel - 1 */
    float dt_min, dt_max, eps;
} Mamba;

/* y[t] = s C[t] after s = s decay[t] + added[t] B[t], for T tokens one after the other, a constant where this is inlined;
 * s (N) is read and written once. B and C of a token lie `apart` numbers after those of the one before, y `span`. */
INLINE void recur(int T, float *s, int64_t N, const float *decays, const float *adds, const float *B, const float *C,
                  int64_t apart, float *y, int64_t span) {
    wide sums[TOGETHER];
    float decay[TOGETHER], added[TOGETHER]; /* not in memory, which s might share as far as the compiler knows */
    for (int t = 0; t < T; t++) {
        sums[t] = (wide){0};
        decay[t] = decays[t];
        added[t] = adds[t];
    }
    int64_t n = 0;
    for (; n + WIDE <= N; n += WIDE) {
        wide some = *(wide *)(s + n);
        for (int t = 0; t < T; t++) {
            some = some * decay[t] + added[t] * *(const wide *)(B + t * apart + n);
            sums[t] += some * *(const wide *)(C + t * apart + n);
        }
        *(wide *)(s + n) = some;
    }
    for (int t = 0; t < T; t++) y[t * span] = wide_total(sums[t]);
    for (; n < N; n++)
        for (int t = 0; t < T; t++) {
            s[n] = s[n] * decay[t] + added[t] * B[t * apart + n];
            y[t * span] += s[n] * C[t * apart + n];
        }
}

typedef struct {
    Mamba d;
    int64_t T;
    const void *projected;
    void *window;
    const void *conv_weight, *conv_bias;
    const float *dt_bias, *A_log, *D;
    float *state;
    const void *norm_weight;
    void *y;
} MambaStep;

/* silu of the convolution of `size` channels of row b from `start` on, for T tokens: token t's go to out + t `apart`.
 * `columns` is a buffer of (2 width + 1) size numbers: window and taps, a row for each position. Inlined with a constant type,
 * and width where it is the usual one. */
INLINE void convolve(int type, int64_t width, const MambaStep *m, int64_t b, int64_t start, int64_t size, float *columns,
                     float *out, int64_t apart) {
    const Mamba d = m->d;
    const int64_t inner = d.heads * d.head_dim, channels = inner + 2 * d.groups * d.state, row = inner + channels + d.heads;
    const int64_t window = (b * channels + start) * width, weight = start * (width + 1);
    float *const taps = columns + width * size;
    /* All of them first: a vector that is read right after its parts were written waits for them. */
    for (int64_t i = 0; i < size; i++)
        for (int64_t k = 0; k < width; k++) columns[k * size + i] = load(m->window, type, window + i * width + k);
    for (int64_t i = 0; i < size; i++)
        for (int64_t k = 0; k <= width; k++) taps[k * size + i] = load(m->conv_weight, type, weight + i * (width + 1) + k);
    for (int64_t i = 0; i < size; i += 8) {
        const int64_t n = size - i < 8 ? size - i : 8;
        v8f seen[8], tap[8];
        for (int64_t k = 0; k <= width; k++) {
            if (k < width) seen[k] = load_some(columns, F32, k * size + i, n);
            tap[k] = load_some(taps, F32, k * size + i, n);
        }
        const v8f bias = m->conv_bias ? load_some(m->conv_bias, type, start + i, n) : splat(0);
        for (int64_t t = 0; t < m->T; t++) {
            v8f sum = bias;
            seen[width] = load_some(m->projected, type, (b * m->T + t) * row + inner + start + i, n);
            for (int64_t k = 0; k <= width; k++) sum += seen[k] * tap[k];
            for (int64_t k = 0; k < width; k++) seen[k] = seen[k + 1];
            store_some(out, F32, t * apart + i, rounded8(silu8(sum), type), n);
        }
        for (int64_t k = 0; k < width; k++) store_some(columns, F32, k * size + i, seen[k], n);
    }
    for (int64_t i = 0; i < size; i++)
        for (int64_t k = 0; k < width; k++) store(m->window, type, window + i * width + k, columns[k * size + i]);
}

/* Group g of row b; `memory` is a buffer as `nh_mamba_step` makes it. Inlined with a constant type. */
INLINE void mamba_group(int type, const MambaStep *m, int64_t b, int64_t g, float *memory) {
    const Mamba d = m->d;
    const int64_t T = m->T, inner = d.heads * d.head_dim, N = d.state, channels = inner + 2 * d.groups * N;
    const int64_t per_group = d.heads / d.groups, span = inner / d.groups, row = inner + channels + d.heads;
    const int64_t token = span + 2 * N, first = b * T * row;
    float *x = memory, *scanned = x + T * token, *decay = scanned + T * span, *added = decay + T, *dt = added + T;
    float *columns = dt + T;
    /* x, B and C of each token, out of the convolution */
    const int64_t starts[3] = {g * span, inner + g * N, inner + d.groups * N + g * N}, sizes[3] = {span, N, N};
    for (int64_t part = 0, to = 0; part < 3; to += sizes[part++]) {
        if (d.width == 3) convolve(type, 3, m, b, starts[part], sizes[part], columns, x + to, token);
        else convolve(type, d.width, m, b, starts[part], sizes[part], columns, x + to, token);
    }
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++) {
        const float A = -expf(m->A_log[h]);
        for (int64_t t = 0; t < T; t++) {
            const float raw = load(m->projected, type, first + t * row + inner + channels + h) + m->dt_bias[h];
            dt[t] = raw != raw ? raw : fminf(fmaxf(raw > 20 ? raw : log1pf(expf(raw)), d.dt_min), d.dt_max); /* NaN stays */
            decay[t] = expf(dt[t] * A);
        }
        const int64_t from = (h - g * per_group) * d.head_dim;
        for (int64_t p = 0; p < d.head_dim; p++) {
            float *s = m->state + ((b * d.heads + h) * d.head_dim + p) * N, *y = scanned + from + p;
            for (int64_t n = 0; n < N; n += 16) __builtin_prefetch(s + 4 * N + n, 1);
            for (int64_t t = 0; t < T; t++) added[t] = dt[t] * x[t * token + from + p];
            for (int64_t t = 0; t < T; t += TOGETHER) {
                const float *B = x + t * token + span, *C = B + N;
#define RECUR(COUNT) recur(COUNT, s, N, decay + t, added + t, B, C, token, y + t * span, span)
                switch (T - t) {
                    case 1: RECUR(1); break;
                    case 2: RECUR(2); break;
                    case 3: RECUR(3); break;
#if TOGETHER == 8
                    case 4: RECUR(4); break;
                    case 5: RECUR(5); break;
                    case 6: RECUR(6); break;
                    case 7: RECUR(7); break;
#endif
                    default: RECUR(TOGETHER);
                }
            }
        }
        for (int64_t t = 0; t < T; t++)
            for (int64_t p = 0; p < d.head_dim; p += 8) {
                const int64_t i = from + p, n = d.head_dim - p < 8 ? d.head_dim - p : 8;
                const v8f sum = load_some(scanned, F32, t * span + i, n) + m->D[h] * load_some(x, F32, t * token + i, n);
                const v8f z = load_some(m->projected, type, first + t * row + g * span + i, n);
                store_some(scanned, F32, t * span + i, rounded8(sum, type) * silu8(z), n);
            }
    }
    for (int64_t t = 0; t < T; t++) {
        const float *u = scanned + t * span;
        v8f squares = splat(0);
        for (int64_t i = 0; i < span; i += 8) {
            const v8f some = load_some(u, F32, i, span - i);
            squares += some * some;
        }
        const float norm = 1 / sqrtf(total(squares) / span + d.eps);
        for (int64_t i = 0; i < span; i += 8) {
            const v8f weight = load_some(m->norm_weight, type, g * span + i, span - i);
            store_some(m->y, type, (b * T + t) * inner + g * span + i, weight * (load_some(u, F32, i, span - i) * norm), span - i);
        }
    }
}

/* A Mamba-2 mixer between in_proj and out_proj, for T tokens of B rows, one token after the other: any split of them into
 * calls gives the same bits.
 *
 * projected (B, T, 2 I + 2 G N + H): z, x, B, C, dt; window (B, I + 2 G N, width) and state (B, H, P, N) are moved on in
 * place; y (B, T, I). Activations, window and weights (convolution, norm) have `type`; dt_bias, A_log, D, state are float32.
 * What the chunked form rounds to `type` (the convolution's and the scan's results) is rounded here too.
 * A group shares nothing with another, the final norm included, so a thread takes groups. width is at most 7. */
int nh_mamba_step(int type, Mamba d, int64_t batch, int64_t T, const void *projected, void *window, const void *conv_weight,
                  const void *conv_bias, const float *dt_bias, const float *A_log, const float *D, float *state,
                  const void *norm_weight, void *y) {
    if (d.width > 7) return 1;
    const MambaStep m = {d, T, projected, window, conv_weight, conv_bias, dt_bias, A_log, D, state, norm_weight, y};
    const int64_t span = d.heads / d.groups * d.head_dim, widest = span > d.state ? span : d.state;
    const int64_t buffer = (T * (2 * span + 2 * d.state + 3) + (2 * d.width + 1) * widest + 15) / 16 * 16;
    char *const taken = malloc(sizeof(float) * batch * d.groups * buffer + 64);
    if (!taken) return 1;
    float *const memory = (float *)(taken + (64 - (uintptr_t)taken % 64)); /* a vector in one cache line, not in two */
#pragma omp parallel for schedule(dynamic, 1) if (batch * T * d.heads * d.head_dim * d.state > WORTH_THREADS / 4)
    for (int64_t task = 0; task < batch * d.groups; task++) {
        if (type == BF16) mamba_group(BF16, &m, task / d.groups, task % d.groups, memory + task * buffer);
        else mamba_group(F32, &m, task / d.groups, task % d.groups, memory + task * buffer);
    }
    free(taken);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------- attend */

/* Q numbers as floats, bfloat16 with even and odd ones of each sixteen apart, as `arrange` does it. */
INLINE void unpack(const void *from, int type, int64_t Q, float *to) {
    if (type == F32) {
        memcpy(to, from, 4 * Q);
        return;
    }
    for (int64_t k = 0; k < Q; k += 16) {
        const v8u pair = *(const v8u *)((const uint16_t *)from + k);
        *(v8f *)(to + k) = (v8f)(pair << 16);
        *(v8f *)(to + k + 8) = (v8f)(pair & 0xffff0000u);
    }
}

/* Keys and values that are worked on at a time: as float32 they stay in the first cache. */
#define SPAN 16

/* score[r][t] = q[r] . k[t] for R queries, a constant where this is inlined. */
INLINE void score_keys(int R, const float *q, const float *k, int64_t count, int64_t Q, float scale, float (*score)[SPAN]) {
    for (int64_t t = 0; t < count; t++) {
        wide dot[4][16 / WIDE];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 16 / WIDE; j++) dot[r][j] = (wide){0};
        for (int64_t i = 0; i < Q; i += 16)
            for (int j = 0; j < 16 / WIDE; j++) {
                const wide some = *(const wide *)(k + t * Q + i + j * WIDE);
                for (int r = 0; r < R; r++) dot[r][j] += some * *(const wide *)(q + r * Q + i + j * WIDE);
            }
        for (int r = 0; r < R; r++) {
            for (int j = 1; j < 16 / WIDE; j++) dot[r][0] += dot[r][j];
            score[r][t] = wide_total(dot[r][0]) * scale;
        }
    }
}

/* out[r] += sum_t weight[r][t] v[t] */
INLINE void add_values(int R, const float (*weight)[SPAN], const float *v, int64_t count, int64_t Q, float *out) {
    for (int64_t i = 0; i < Q; i += WIDE) {
        wide sum[4];
        for (int r = 0; r < R; r++) sum[r] = *(wide *)(out + r * Q + i);
        for (int64_t t = 0; t < count; t++) {
            const wide value = *(const wide *)(v + t * Q + i);
            for (int r = 0; r < R; r++) sum[r] += weight[r][t] * value;
        }
        for (int r = 0; r < R; r++) *(wide *)(out + r * Q + i) = sum[r];
    }
}

/* Enough parts that threads finish together, each long enough to be worth joining. */
INLINE int64_t splits_of(int64_t L) { return L < 256 ? 1 : L > 1024 ? 8 : L / 128; }

/* y (B, A, T, Q): T queries a head, q (B, A, T, Q), over L keys and values (B, A / R, L, Q), whose rows of Q lie one after
 * the other and whose heads and batch rows lie `head` and `row` numbers apart (keys, then values). The queries are the last
 * T of the L positions and see none after their own. Q is a multiple of 16. Every R query heads read a key head once. The keys are cut in `splits`, softmaxed apart and joined, so that threads have work. */
int nh_attend(int type, const void *q, const void *k, const void *v, void *y, int64_t batch, int64_t key_heads, int64_t heads,
              int64_t T, int64_t L, int64_t Q, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, float scale) {
    const int64_t splits = splits_of(L), R = heads * T; /* rows that read a key head */
    const int64_t bytes = type == BF16 ? 2 : 4, per = R * (Q + 2), tasks = batch * key_heads * splits;
    const int64_t buffer = R * Q + SPAN * Q + R * SPAN;
    float *memory = malloc(sizeof(float) * tasks * (per + buffer));
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic, 1) if (batch * key_heads * R * L * Q > WORTH_THREADS / 2)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t split = task % splits, kv = task / splits % key_heads, b = task / splits / key_heads;
        const int64_t from = L * split / splits, to = L * (split + 1) / splits;
        float *out = memory + task * per, *top = out + R * Q, *sum = top + R;
        float *queries = memory + tasks * per + task * buffer, *rows = queries + R * Q;
        float(*weight)[SPAN] = (float(*)[SPAN])(rows + SPAN * Q);
        for (int64_t r = 0; r < R; r++) {
            unpack((const char *)q + ((b * key_heads + kv) * R + r) * Q * bytes, type, Q, queries + r * Q);
            top[r] = -INFINITY;
            sum[r] = 0;
        }
        memset(out, 0, sizeof(float) * R * Q);
        for (int64_t l = from; l < to; l += SPAN) {
            const int64_t count = to - l < SPAN ? to - l : SPAN;
            for (int64_t t = 0; t < count; t++)
                unpack((const char *)k + (b * k_row + kv * k_head + (l + t) * Q) * bytes, type, Q, rows + t * Q);
            int64_t r = 0;
            for (; r + 4 <= R; r += 4) score_keys(4, queries + r * Q, rows, count, Q, scale, weight + r);
            if (R - r == 3) score_keys(3, queries + r * Q, rows, count, Q, scale, weight + r);
            else if (R - r == 2) score_keys(2, queries + r * Q, rows, count, Q, scale, weight + r);
            else if (R - r == 1) score_keys(1, queries + r * Q, rows, count, Q, scale, weight + r);
            for (r = 0; r < R; r++) {
                const int64_t limit = L - T + r % T + 1 - l, seen = limit < 0 ? 0 : limit < count ? limit : count;
                for (int64_t t = seen; t < SPAN; t++) weight[r][t] = -INFINITY;
                v8f *const low = (v8f *)weight[r], *const high = low + 1;
                const v8i above = (v8i)(*high > *low);
                const v8f either = (v8f)(((v8i)*high & above) | ((v8i)*low & ~above));
                float largest = top[r];
                for (int j = 0; j < 8; j++) largest = either[j] > largest ? either[j] : largest;
                if (largest > top[r]) {
                    const float shrink = expf(top[r] - largest);
                    for (int64_t i = 0; i < Q; i += 8) *(v8f *)(out + r * Q + i) *= splat(shrink);
                    sum[r] *= shrink;
                    top[r] = largest;
                }
                *low = exponential(*low - splat(largest));
                *high = exponential(*high - splat(largest));
                for (int64_t t = seen; t < SPAN; t++) weight[r][t] = 0;
                sum[r] += total(*low + *high);
            }
            for (int64_t t = 0; t < count; t++)
                unpack((const char *)v + (b * v_row + kv * v_head + (l + t) * Q) * bytes, type, Q, rows + t * Q);
            for (r = 0; r + 4 <= R; r += 4) add_values(4, weight + r, rows, count, Q, out + r * Q);
            if (R - r == 3) add_values(3, weight + r, rows, count, Q, out + r * Q);
            else if (R - r == 2) add_values(2, weight + r, rows, count, Q, out + r * Q);
            else if (R - r == 1) add_values(1, weight + r, rows, count, Q, out + r * Q);
        }
    }
    for (int64_t a = 0; a < batch * key_heads * R; a++) {
        const int64_t kv = a / R, r = a % R;
        float top = -INFINITY, sum = 0;
        for (int64_t s = 0; s < splits; s++) top = fmaxf(top, memory[(kv * splits + s) * per + R * Q + r]);
        for (int64_t s = 0; s < splits; s++) {
            const float *part = memory + (kv * splits + s) * per;
            sum += part[R * Q + R + r] * expf(part[R * Q + r] - top);
        }
        for (int64_t i = 0; i < Q; i++) {
            float value = 0;
            for (int64_t s = 0; s < splits; s++) {
                const float *part = memory + (kv * splits + s) * per;
                value += part[r * Q + i] * expf(part[R * Q + r] - top);
            }
            const int64_t to = type == BF16 ? i / 16 * 16 + i % 8 * 2 + i % 16 / 8 : i;
            store(y, type, a * Q + to, value / sum);
        }
    }
    free(memory);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------- blocks */

enum { MAMBA = 0, ATTENTION = 1, MLP = 2 };

typedef struct {
    int64_t type, N, K; /* (N, K), no bias */
    const void *weight, *scale;
} Weight;

/* One layer, x + mixer(norm(x)), and what it remembers. Fields of other kinds of layers are not read. */
typedef struct {
    int64_t kind;
    const void *norm;
    Weight first, last;  /* in_proj, q_proj or up_proj; out_proj, o_proj or down_proj */
    Weight key, value;
    const void *conv_weight, *conv_bias, *gated_norm;
    const float *dt_bias, *A_log, *D;
    void *window;
    float *state;
    void *record; /* where what in_proj gave goes, z left out, or 0 */
    int64_t key_heads, head_dim, length, k_row, k_head, v_row, v_head; /* length: with these tokens', which are written */
    void *keys, *values;
    Mamba mamba;
    float eps, scale;
} Block;

static int apply(const Weight *w, int type, const void *x, void *y, int64_t batch) {
    return nh_linear((int)w->type, type, w->weight, w->scale, x, y, batch, w->N, w->K, 0, 0);
}

/* (X, Y, Q) -> (Y, X, Q) for each of B. */
static void swap(const char *from, char *to, int64_t bytes, int64_t B, int64_t X, int64_t Y, int64_t Q) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t x = 0; x < X; x++)
            for (int64_t y = 0; y < Y; y++)
                memcpy(to + bytes * Q * ((b * Y + y) * X + x), from + bytes * Q * ((b * X + x) * Y + y), bytes * Q);
}

/* x (B, T, D) through `count` layers for T tokens, in place. Every op rounds to `type` where its own function does.
 * Returns 0, or 1 where memory ran out: x, keys, values and states are then of no use. */
int nh_blocks(int type, const Block *blocks, int64_t count, int64_t batch, int64_t T, int64_t D, void *x) {
    const int64_t bytes = type == BF16 ? 2 : 4, rows = batch * T;
    int64_t widest = D, inner = D;
    for (int64_t i = 0; i < count; i++) {
        if (blocks[i].first.N > widest) widest = blocks[i].first.N;
        if (blocks[i].last.K > inner) inner = blocks[i].last.K;
    }
    char *memory = malloc(bytes * rows * (2 * D + widest + 4 * inner));
    if (!memory) return 1;
    char *normed = memory, *added = normed + bytes * rows * D, *wide = added + bytes * rows * D;
    char *between = wide + bytes * rows * widest, *key = between + bytes * rows * inner, *value = key + bytes * rows * inner;
    char *turned = value + bytes * rows * inner;
    int failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) {
        const Block *l = blocks + i;
        failed |= nh_rms_norm(type, x, l->norm, normed, rows, D, l->eps);
        failed |= apply(&l->first, type, normed, wide, rows);
        const void *inside = between;
        if (l->kind == MAMBA) {
            failed |= nh_mamba_step(type, l->mamba, batch, T, wide, l->window, l->conv_weight, l->conv_bias, l->dt_bias, l->A_log,
                                    l->D, l->state, l->gated_norm, between);
            const int64_t skipped = l->last.K, kept = l->first.N - skipped; /* without z */
            if (l->record)
                for (int64_t n = 0; n < rows; n++)
                    memcpy((char *)l->record + bytes * n * kept, wide + bytes * (n * l->first.N + skipped), bytes * kept);
        } else if (l->kind == ATTENTION) {
            const int64_t Q = l->head_dim, KH = l->key_heads, heads = l->first.N / Q;
            failed |= apply(&l->key, type, normed, key, rows) | apply(&l->value, type, normed, value, rows);
            for (int64_t n = 0; n < rows * KH; n++) {
                const int64_t b = n / KH / T, at = l->length - T + n / KH % T, h = n % KH;
                memcpy((char *)l->keys + bytes * (b * l->k_row + h * l->k_head + at * Q), key + bytes * n * Q, bytes * Q);
                memcpy((char *)l->values + bytes * (b * l->v_row + h * l->v_head + at * Q), value + bytes * n * Q, bytes * Q);
            }
            if (T > 1) swap(wide, turned, bytes, batch, T, heads, Q);
            failed |= nh_attend(type, T > 1 ? turned : wide, l->keys, l->values, between, batch, KH, heads / KH, T, l->length, Q,
                                l->k_row, l->k_head, l->v_row, l->v_head, l->scale);
            if (T > 1) {
                swap(between, turned, bytes, batch, heads, T, Q);
                inside = turned;
            }
        } else {
            for (int64_t n = 0; n < rows * l->first.N; n++) {
                const float u = load(wide, type, n);
                store(wide, type, n, u > 0 ? u * u : u != u ? u : 0); /* relu(u)^2; NaN stays */
            }
            inside = wide;
        }
        failed |= apply(&l->last, type, inside, added, rows);
        for (int64_t n = 0; n < rows * D; n++) store(x, type, n, load(x, type, n) + load(added, type, n));
    }
    free(memory);
    return failed;
}
