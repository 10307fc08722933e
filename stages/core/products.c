/* Products of bfloat16 where sampling spends its time: few rows, one a sequence, and weights that no
 * cache holds.
 *
 * A weight [columns, size] comes in panels of 32 columns, each [size / 2, 32, 2], with zeros for what
 * lacks in the last one: what a processor with AVX512-BF16 reads at once lies together, and all of it
 * in the order in which it is read. While all rows are multiplied by a panel, a later one is asked
 * for, so that a product takes as long as the multiplications or as the memory, not as both. Sums are
 * in float32. A row's result depends neither on other rows nor on the number of threads.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { COLUMNS = 32, VECTORS = COLUMNS / 16, /* of a panel */
       TOGETHER = 14,                        /* rows whose sums fill the registers */
       LINE = 64, CACHED = 1 << 18 };        /* bytes: read at once; of panels, a share of the L2 */

/* A product of rows that lie `size` apart with a panel. Rows of the result lie `columns` apart, and
 * the first `left` numbers of each are the panel's. Asks for what is at `next`, `step` bytes for
 * each pair. */
INLINE void product_of(int rows, long size, long columns, long left, const uint16_t *states,
                       const uint16_t *panel, const float *bias, uint16_t *result,
                       const char *next, long step)
{
    __m512 sums[TOGETHER][VECTORS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < VECTORS; v++)
            sums[row][v] = bias ? _mm512_loadu_ps(bias + 16 * v) : _mm512_setzero_ps();
    for (long pair = 0; pair < size / 2; pair++, panel += 2 * COLUMNS, next += step) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            weights[v] = (__m512bh)_mm512_loadu_si512(panel + 32 * v);
            _mm_prefetch(next + LINE * v, _MM_HINT_T1);
        }
        for (int row = 0; row < rows; row++) {
            int32_t both;
            memcpy(&both, states + row * size + 2 * pair, sizeof both);
            __m512bh state = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < VECTORS; v++)
                sums[row][v] = _mm512_dpbf16_ps(sums[row][v], state, weights[v]);
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        long count = left - 16 * v < 0 ? 0 : left - 16 * v;
        __mmask16 mask = (__mmask16)(count < 16 ? (1 << count) - 1 : 0xffff);
        for (int row = 0; row < rows; row++)
            _mm256_mask_storeu_epi16(result + row * columns + 16 * v, mask,
                                     (__m256i)_mm512_cvtneps_pbh(sums[row][v]));
    }
}

#define CASE(count)                                                                                \
    case count:                                                                                    \
        product_of(count, size, columns, left, states, panel, bias, result, next, step);           \
        break;

/* The same, with code of its own for each number of rows. */
static void product_of_rows(long rows, long size, long columns, long left, const uint16_t *states,
                            const uint16_t *panel, const float *bias, uint16_t *result,
                            const char *next, long step)
{
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
    }
}

/* result [rows, columns] = states [rows, size] times the weight, plus bias, which is NULL or as long
 * as the panels; size is even. */
void product(long rows, long size, long columns, const uint16_t *states, const uint16_t *panels,
             const float *bias, uint16_t *result, int threads)
{
    long blocks = (rows + TOGETHER - 1) / TOGETHER, panel = COLUMNS * size;
    /* All blocks together ask for one panel. */
    long step = blocks ? (VECTORS * LINE + blocks - 1) / blocks : 0;
    long several = CACHED / (2 * panel) ? CACHED / (2 * panel) * COLUMNS : COLUMNS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long first = 0; first < columns; first += several) {
        for (long block = 0; block < blocks; block++) {
            long row = rows * block / blocks, count = rows * (block + 1) / blocks - row;
            for (long column = first; column < columns && column < first + several;
                 column += COLUMNS) {
                const uint16_t *from = panels + column * size;
                const char *next = (const char *)(from + several * size) + block * size / 2 * step;
                product_of_rows(count, size, columns, columns - column, states + row * size, from,
                                bias ? bias + column : NULL, result + row * columns + column, next,
                                step);
            }
        }
    }
}
