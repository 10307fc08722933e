/* Products where sampling spends its time: few rows, one a sequence, and weights that no cache holds.
 *
 * A weight [columns, size] comes in panels of as many columns as two vectors have numbers, each
 * [size, columns] in float32 and [size / 2, columns, 2] in bfloat16, with zeros for what lacks in the
 * last one: it lies in the order in which it is read. While all rows are multiplied by a panel, a
 * later one is asked for, so that a product takes as long as the multiplications or as the memory,
 * not as both. Sums are in float32. A row's result depends neither on other rows nor on the number
 * of threads.
 */
#include "vectors.h"

#include "kernels.h"

/* A word is what a row gives to one step of a sum: a number of float32, or a pair of bfloat16. */
enum { OF_A_PANEL = 2, /* vectors */
       WORD = 4,
       LINE = 64,        /* bytes that are read at once */
       CACHED = 1 << 18, /* bytes of panels, a share of the L2 */
/* Rows whose sums stay in registers; and not more than an L1 has ways, as rows may lie whole pages
 * apart. */
#if defined(__AVX512F__)
       ROWS_TOGETHER = 8
#else
       ROWS_TOGETHER = 6
#endif
};

const int columns_of_a_panel = OF_A_PANEL * WIDTH;
#if defined(__AVX512BF16__)
const int multiplies_bfloat16 = 1;
#else
const int multiplies_bfloat16 = 0;
#endif

INLINE Floats word_added(Floats sum, int32_t word, const char *weights, int format)
{
#if defined(__AVX512BF16__)
    if (format)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word),
                                        (__m512bh)_mm512_loadu_si512(weights));
#endif
    (void)format;
    float number;
    memcpy(&number, &word, sizeof number);
    return sum + all(number) * load(weights, 0, 0, WIDTH);
}

/* Rows that lie one after the other, times a panel. Rows of the result lie `columns` apart, and the
 * first `left` numbers of each are the panel's; if `adds`, what is there is added. Asks for what is at
 * `next`, `step` bytes for each word. */
INLINE void multiply_rows(const int rows, long words, long columns, long left, const int32_t *states,
                          const char *panel, const float *bias, int adds, void *result,
                          int format, const char *next, long step)
{
    Floats sums[ROWS_TOGETHER][OF_A_PANEL];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < OF_A_PANEL; v++)
            sums[row][v] = bias ? load(bias, 0, v * WIDTH, WIDTH) : all(0.f);
    for (int row = 0; adds && row < rows; row++)
        for (int v = 0; v < OF_A_PANEL && v * WIDTH < left; v++)
            sums[row][v] += load(result, format, row * columns + v * WIDTH,
                                 left - v * WIDTH < WIDTH ? left - v * WIDTH : WIDTH);
    for (long word = 0; word < words; word++, next += step) {
        for (int v = 0; v < OF_A_PANEL; v++)
            __builtin_prefetch(next + LINE * v, 0, 2);
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < OF_A_PANEL; v++)
                sums[row][v] = word_added(sums[row][v], states[row * words + word],
                                          panel + (word * OF_A_PANEL + v) * WORD * WIDTH, format);
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < OF_A_PANEL && v * WIDTH < left; v++)
            store(result, format, row * columns + v * WIDTH,
                  left - v * WIDTH < WIDTH ? left - v * WIDTH : WIDTH, sums[row][v]);
}

#define CASE(count)                                                                                \
    case count:                                                                                    \
        format ? multiply_rows(count, words, columns, left, states, panel, bias, adds, result, 1,  \
                               next, step)                                                         \
               : multiply_rows(count, words, columns, left, states, panel, bias, adds, result, 0,  \
                               next, step);                                                        \
        break;

/* The same, with code of its own for each number of rows. */
static void multiply_some(long rows, long words, long columns, long left, const int32_t *states,
                          const char *panel, const float *bias, int adds, void *result,
                          int format, const char *next, long step)
{
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8)
#endif
    }
}

/* result [rows, columns] = states [rows, size] times the weight, plus bias, which is NULL or as long
 * as the panels, plus what the result was if `adds`. In bfloat16, which not every build has, size is
 * even. */
void multiply(long rows, long size, long columns, const void *states, const void *panels,
              const float *bias, int adds, void *result, int format, int threads)
{
    long words = format ? size / 2 : size, width = OF_A_PANEL * WIDTH, panel = words * width * WORD;
    long blocks = (rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
    /* All blocks together ask for one panel. */
    long step = blocks ? (OF_A_PANEL * LINE + blocks - 1) / blocks : 0;
    long several = CACHED / panel ? CACHED / panel : 1;
    ROWS
    for (long first = 0; first < columns; first += several * width) {
        for (long block = 0; block < blocks; block++) {
            long row = rows * block / blocks, count = rows * (block + 1) / blocks - row;
            for (long column = first; column < columns && column < first + several * width;
                 column += width) {
                const char *from = (const char *)panels + column / width * panel;
                multiply_some(count, words, columns, columns - column,
                              (const int32_t *)states + row * words, from,
                              bias ? bias + column : NULL, adds,
                              at(result, format, row * columns + column), format,
                              from + several * panel + block * words * step, step);
            }
        }
    }
}
