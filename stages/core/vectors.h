/* Vectors of numbers as GCC and Clang have them, and how they are read and written in float32 and
 * bfloat16 (`format` 0 or 1). */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
/* Rows are divided among threads; which thread has which changes nothing. */
#define ROWS _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

/* Numbers of a vector: GCC takes wider ones than the processor's apart number by number. */
#if defined(WIDTH)
#elif defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

/* Less 0, of which GCC makes nothing; 0 plus a number would be added up, for -0's sake. */
INLINE Floats all(float value)
{
    return value - (Floats){};
}

/* Where a mask is set (all bits of a number), one; elsewhere the other. */
INLINE Floats chosen(Integers mask, Floats one, Floats other)
{
    return (Floats)(((Integers)one & mask) | ((Integers)other & ~mask));
}

/* What GCC makes many instructions of, and with AVX-512 takes few. Where a number of either is NaN,
 * the greater is the other's. */
#if defined(__AVX512F__)
INLINE Floats greater(Floats one, Floats other)
{
    return (Floats)_mm512_max_ps((__m512)one, (__m512)other);
}

INLINE Floats widened(Halves values)
{
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)values), 16);
}

INLINE Floats first_floats(const void *row, long count)
{
    return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), row);
}

INLINE Halves first_halves(const void *row, long count)
{
    return (Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), row);
}

INLINE float sum_of(Floats values)
{
    return _mm512_reduce_add_ps((__m512)values);
}

INLINE float greatest_of(Floats values)
{
    return _mm512_reduce_max_ps((__m512)values);
}
#else
INLINE Floats greater(Floats one, Floats other)
{
    return chosen(one > other, one, other);
}

INLINE Floats widened(Halves values)
{
    return (Floats)(__builtin_convertvector(values, Words) << 16);
}

INLINE Floats first_floats(const void *row, long count)
{
    Floats found = {};
    memcpy(&found, row, 4 * (size_t)count);
    return found;
}

INLINE Halves first_halves(const void *row, long count)
{
    Halves found = {};
    memcpy(&found, row, 2 * (size_t)count);
    return found;
}

INLINE float sum_of(Floats values)
{
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            values[i] += values[i + half];
    return values[0];
}

INLINE float greatest_of(Floats values)
{
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            values[i] = values[i + half] > values[i] ? values[i + half] : values[i];
    return values[0];
}
#endif

/* The nearest bfloat16, and of two the even one; NaN stays NaN. The instruction of AVX512-BF16 gives
 * 0 for what is no normal number. */
#if defined(__AVX512BF16__)
INLINE Halves narrowed(Floats values)
{
    return (Halves)_mm512_cvtneps_pbh((__m512)values);
}
#else
INLINE Halves narrowed(Floats values)
{
    Words bits = (Words)values;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits |= (Words)(values != values) & 0x7fc0;
    return __builtin_convertvector(bits, Halves);
}
#endif

INLINE void *at(const void *row, int format, long index)
{
    return (char *)row + index * (format ? 2 : 4);
}

/* `count` numbers from `index` on, and 0 behind them. */
INLINE Floats load(const void *row, int format, long index, long count)
{
    const void *from = at(row, format, index);
    if (count < WIDTH)
        return format ? widened(first_halves(from, count)) : first_floats(from, count);
    Floats floats;
    Halves halves;
    if (!format) {
        memcpy(&floats, from, sizeof floats);
        return floats;
    }
    memcpy(&halves, from, sizeof halves);
    return widened(halves);
}

INLINE void store(void *row, int format, long index, long count, Floats values)
{
    if (!format) {
        memcpy(at(row, 0, index), &values, 4 * (size_t)count);
        return;
    }
    Halves found = narrowed(values);
    memcpy(at(row, 1, index), &found, 2 * (size_t)count);
}

/* Run for vectors from `first` to before `last`: i is where one begins, n how many numbers it has.
 * The last has its own copy of the code, so that all others have a constant length. */
#define VECTORS(first, last, ...)                                                                  \
    do {                                                                                           \
        long i = first;                                                                            \
        for (; i + WIDTH <= last; i += WIDTH) {                                                    \
            const long n = WIDTH;                                                                  \
            __VA_ARGS__                                                                            \
        }                                                                                          \
        if (i < last) {                                                                            \
            const long n = last - i;                                                               \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    } while (0)

/* The same for the first `seen` numbers of a row of `columns`; all but the last have `left`, how many
 * of its numbers are seen, as a constant. */
#define SEEN(seen, columns, ...)                                                                   \
    do {                                                                                           \
        const long n = WIDTH;                                                                      \
        long i = 0;                                                                                \
        for (; i + WIDTH <= seen; i += WIDTH) {                                                    \
            const long left = WIDTH;                                                               \
            (void)left;                                                                            \
            __VA_ARGS__                                                                            \
        }                                                                                          \
        const long left = seen - i; /* not all that is run reads it */                             \
        if (left > 0 && i + WIDTH <= columns) {                                                    \
            __VA_ARGS__                                                                            \
        } else if (left > 0) {                                                                     \
            const long n = columns - i;                                                            \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    } while (0)

/* The first n numbers of a vector; `other` behind them. */
INLINE Floats first_of(Floats values, long n, Floats other)
{
    Integers places;
    for (int i = 0; i < WIDTH; i++)
        places[i] = i;
    return n >= WIDTH ? values : chosen(places < (int32_t)n, values, other);
}

/* e^x to 2 units of the last place; 0 below -87.3, where it is no normal number, e^88 above 88.
 * 2^n e^f with |f| <= log(2) / 2; the polynomial is that of Cephes (Moshier), expf.c. */
INLINE Floats exponential(Floats x)
{
    const float round = 12582912.f; /* 1.5 * 2^23: adding it leaves an integer in the last bits */
    Integers tiny = x < -87.3f;
    x = greater(all(-87.3f), x);
    x = -greater(all(-88.f), -x);
    Floats shifted = x * 1.44269504088896341f + round;
    Floats whole = shifted - round;
    Floats f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
    Floats power = (Floats)(((Integers)shifted - 0x4b400000 + 127) << 23);
    return (Floats)((Integers)(p * power) & ~tiny);
}

INLINE Floats sigmoid(Floats x)
{
    return 1.f / (1.f + exponential(-x));
}

/* scale = 1 / sqrt(mean x^2 + epsilon), result = x * scale * weight, which may be where x is. */
INLINE float rms_norm_row(long size, const void *x, int x_format, const float *weight, float epsilon,
                          void *result, int format)
{
    Floats squares = {};
    VECTORS(0, size, {
        Floats some = load(x, x_format, i, n);
        squares += some * some;
    });
    float scale = 1.f / sqrtf(sum_of(squares) / (float)size + epsilon);
    VECTORS(0, size, {
        store(result, format, i, n, load(x, x_format, i, n) * scale * load(weight, 0, i, n));
    });
    return scale;
}

#endif
