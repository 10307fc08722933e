/* Parts of a layer that torch computes by several passes over memory, in one each.
 *
 * Tensors are contiguous, rows after rows, in float32 or bfloat16 (`format` 0 or 1); sums are in
 * float32. A result does not depend on the number of threads, nor on other rows. Built once for
 * each instruction set that `stages.core.kernels` chooses from.
 */
#include "vectors.h"

#include <omp.h>

#include "kernels.h"

/* Of the functions and their arguments; `stages.core.kernels` calls no other. */
const int interface_version = 6;

enum { SUMMED = 4096, /* numbers that are added up in float32; sums of these, in double */
       ROWS_OF_A_SUM = 64 };
const int rows_of_a_sum = ROWS_OF_A_SUM;

void rms_norm(long rows, long size, const float *states, const float *weight, float epsilon,
              void *result, int format, float *scales, int threads)
{
    ROWS
    for (long row = 0; row < rows; row++) {
        const float *x = states + row * size;
        void *y = at(result, format, row * size);
        scales[row] = format ? rms_norm_row(size, x, 0, weight, epsilon, y, 1)
                             : rms_norm_row(size, x, 0, weight, epsilon, y, 0);
    }
}

/* kept, in the format of grad, times inverse is the normalised x; or where inverse is NULL kept is
 * x, in float32. The gradient of the weight is added to d_weight. */
INLINE void rms_norm_backward_row(long size, const void *kept, const float *inverse,
                                  const float *weight, float scale, const void *grad, int format,
                                  float *d_states, float *d_weight)
{
    int kept_format = inverse ? format : 0;
    Floats sum = {};
    VECTORS(0, size, {
        Floats normed = load(kept, kept_format, i, n) *
                        (inverse ? load(inverse, 0, i, n) : all(scale));
        Floats product = normed * load(grad, format, i, n);
        store(d_weight, 0, i, n, load(d_weight, 0, i, n) + product);
        sum += product * load(weight, 0, i, n);
    });
    float along = sum_of(sum) / (float)-size;
    VECTORS(0, size, {
        Floats normed = load(kept, kept_format, i, n) *
                        (inverse ? load(inverse, 0, i, n) : all(scale));
        Floats above = load(grad, format, i, n) * load(weight, 0, i, n);
        store(d_states, 0, i, n, (above + normed * along) * scale);
    });
}

/* d_weight is [ceil(rows / 64), size]: the sum over each 64 rows. */
void rms_norm_backward(long rows, long size, const void *kept, const float *inverse,
                       const float *weight, const float *scales, const void *grad, int format,
                       float *d_states, float *d_weight, int threads)
{
    memset(d_weight, 0,
           (size_t)((rows + ROWS_OF_A_SUM - 1) / ROWS_OF_A_SUM * size) * sizeof(float));
    ROWS
    for (long first = 0; first < rows; first += ROWS_OF_A_SUM) {
        float *sum = d_weight + first / ROWS_OF_A_SUM * size;
        for (long row = first; row < rows && row < first + ROWS_OF_A_SUM; row++) {
            const void *k = at(kept, inverse ? format : 0, row * size);
            const void *g = at(grad, format, row * size);
            float *d = d_states + row * size;
            if (!inverse && format)
                rms_norm_backward_row(size, k, NULL, weight, scales[row], g, 1, d, sum);
            else if (!inverse)
                rms_norm_backward_row(size, k, NULL, weight, scales[row], g, 0, d, sum);
            else if (format)
                rms_norm_backward_row(size, k, inverse, weight, scales[row], g, 1, d, sum);
            else
                rms_norm_backward_row(size, k, inverse, weight, scales[row], g, 0, d, sum);
        }
    }
}

/* silu(gate) * up. */
INLINE void gated_row(long size, const void *gate, const void *up, void *result, int format)
{
    VECTORS(0, size, {
        Floats x = load(gate, format, i, n);
        store(result, format, i, n, x * sigmoid(x) * load(up, format, i, n));
    });
}

/* Rows of gate and up lie `stride` apart, those of the result one after the other. */
void gated(long rows, long size, long stride, const void *gate, const void *up, void *result,
           int format, int threads)
{
    ROWS
    for (long row = 0; row < rows; row++) {
        const void *g = at(gate, format, row * stride), *u = at(up, format, row * stride);
        void *y = at(result, format, row * size);
        format ? gated_row(size, g, u, y, 1) : gated_row(size, g, u, y, 0);
    }
}

/* Overwrites grad with the gradient of gate, and writes that of up and the product itself. */
INLINE void gated_backward_row(long size, void *grad, const void *gate, const void *up, void *d_up,
                               void *product, int format)
{
    VECTORS(0, size, {
        Floats x = load(gate, format, i, n), opened = load(up, format, i, n);
        Floats above = load(grad, format, i, n);
        Floats open = sigmoid(x), active = x * open;
        store(product, format, i, n, active * opened);
        store(d_up, format, i, n, active * above);
        store(grad, format, i, n, above * opened * open * (1.f + x * (1.f - open)));
    });
}

void gated_backward(long rows, long size, void *grad, const void *gate, const void *up, void *d_up,
                    void *product, int format, int threads)
{
    ROWS
    for (long row = 0; row < rows; row++) {
        const void *g = at(gate, format, row * size), *u = at(up, format, row * size);
        void *d = at(grad, format, row * size), *d_u = at(d_up, format, row * size);
        void *y = at(product, format, row * size);
        format ? gated_backward_row(size, d, g, u, d_u, y, 1)
               : gated_backward_row(size, d, g, u, d_u, y, 0);
    }
}

/* total += part, number by number. */
void add(long count, float *total, const void *part, int format, int threads)
{
    ROWS
    for (long first = 0; first < count; first += SUMMED) {
        long last = first + SUMMED < count ? first + SUMMED : count;
        if (format)
            VECTORS(first, last, {
                store(total, 0, i, n, load(total, 0, i, n) + load(part, 1, i, n));
            });
        else
            VECTORS(first, last, {
                store(total, 0, i, n, load(total, 0, i, n) + load(part, 0, i, n));
            });
    }
}

/* (l, r) -> (l cos - r sin, r cos + l sin) for the halves l and r of the dimensions of some heads,
 * by `half` numbers of cos and sin; sign -1 turns back. */
INLINE void rotate_heads(long heads, long half, const void *states, const float *cos,
                         const float *sin, float sign, void *result, int format)
{
    for (long head = 0; head < heads; head++) {
        const void *x = at(states, format, head * 2 * half);
        void *y = at(result, format, head * 2 * half);
        VECTORS(0, half, {
            Floats left = load(x, format, i, n), right = load(x, format, half + i, n);
            Floats c = load(cos, 0, i, n), s = load(sin, 0, i, n) * sign;
            store(y, format, i, n, left * c - right * s);
            store(y, format, half + i, n, right * c + left * s);
        });
    }
}

/* cos and sin are [tokens, dim], of which the first halves are read. */
void rotate(long tokens, long heads, long dim, const void *states, const float *cos,
            const float *sin, float sign, void *result, int format, int threads)
{
    ROWS
    for (long token = 0; token < tokens; token++) {
        const void *x = at(states, format, token * heads * dim);
        const float *c = cos + token * dim, *s = sin + token * dim;
        void *y = at(result, format, token * heads * dim);
        /* Small heads are all rest: of a constant length it is a few instructions, not a loop. */
        if (format)
            dim == 8    ? rotate_heads(heads, 4, x, c, s, sign, y, 1)
            : dim == 16 ? rotate_heads(heads, 8, x, c, s, sign, y, 1)
                        : rotate_heads(heads, dim / 2, x, c, s, sign, y, 1);
        else
            dim == 8    ? rotate_heads(heads, 4, x, c, s, sign, y, 0)
            : dim == 16 ? rotate_heads(heads, 8, x, c, s, sign, y, 0)
                        : rotate_heads(heads, dim / 2, x, c, s, sign, y, 0);
    }
}

/* Columns that are worked through for the first `seen` of them: whole vectors, where the row has
 * room. */
INLINE long padded(long seen, long columns)
{
    long whole = (seen + WIDTH - 1) / WIDTH * WIDTH;
    return whole < columns ? whole : columns;
}

/* Overwrites scores with the softmax of the first `seen`, and 0; work holds as many numbers. */
INLINE void softmax_row(long columns, long seen, void *scores, int format, float *work)
{
    long end = padded(seen, columns);
    Floats greatest = all(-INFINITY), total = {};
    SEEN(seen, columns, {
        greatest = greater(first_of(load(scores, format, i, n), left, greatest), greatest);
    });
    greatest = all(greatest_of(greatest));
    SEEN(seen, columns, {
        Floats some = exponential(load(scores, format, i, n) - greatest);
        some = first_of(some, left, all(0.f));
        store(work, 0, i, n, some);
        total += some;
    });
    Floats factor = all(1.f / sum_of(total));
    SEEN(seen, columns, { store(scores, format, i, n, load(work, 0, i, n) * factor); });
    memset(at(scores, format, end), 0, (size_t)(columns - end) * (format ? 2 : 4));
}

/* Row j of a chunk sees all of its columns but the last chunk - j - 1: there the softmax is 0. Work
 * holds a row for each thread. */
void causal_softmax(long rows, long columns, long chunk, void *scores, int format, float *work,
                    int threads)
{
    ROWS
    for (long row = 0; row < rows; row++) {
        void *x = at(scores, format, row * columns);
        float *own = work + omp_get_thread_num() * columns;
        long seen = columns - chunk + row % chunk + 1;
        format ? softmax_row(columns, seen, x, 1, own) : softmax_row(columns, seen, x, 0, own);
    }
}

/* Overwrites grad, that of the weights, with that of the scores: 0 where the weights are. */
INLINE void softmax_backward_row(long columns, long seen, const void *weights, void *grad,
                                 int format)
{
    long end = padded(seen, columns);
    Floats sum = {};
    SEEN(seen, columns, {
        sum += load(weights, format, i, n) * load(grad, format, i, n);
    });
    Floats mean = all(sum_of(sum));
    SEEN(seen, columns, {
        Floats above = load(grad, format, i, n) - mean;
        store(grad, format, i, n, load(weights, format, i, n) * above);
    });
    memset(at(grad, format, end), 0, (size_t)(columns - end) * (format ? 2 : 4));
}

void causal_softmax_backward(long rows, long columns, long chunk, const void *weights, void *grad,
                             int format, int threads)
{
    ROWS
    for (long row = 0; row < rows; row++) {
        const void *w = at(weights, format, row * columns);
        void *d = at(grad, format, row * columns);
        long seen = columns - chunk + row % chunk + 1;
        format ? softmax_backward_row(columns, seen, w, d, 1)
               : softmax_backward_row(columns, seen, w, d, 0);
    }
}

/* Tokens that queries of a key head see: keys [dim, tokens], whose rows lie `stride` apart, and
 * values [tokens, dim]. */
typedef struct {
    const void *keys, *values;
    long tokens, stride;
} Seen;

enum { TOGETHER = 4, /* queries of a key head that are worked through at once */
       SUMMED_BY_QUERY = 16 /* products that are added up, and then these sums: less rounding */ };
const int queries_together = TOGETHER;

/* result[g, i] = sum over k of factors[g, k] rows[k, i], added if `adds`, for `vectors` of n numbers
 * from i on; rows lie `stride` apart. Several sums at once, as each waits for its adder. */
INLINE void product_at(const long queries, const long vectors, const int adds, long count,
                       const float *factors, long factor_stride, const void *rows, int format,
                       long stride, float *result, long result_stride, long i, long n)
{
    Floats sums[TOGETHER][2] = {};
    for (long first = 0; first < count; first += SUMMED_BY_QUERY) {
        long last = first + SUMMED_BY_QUERY < count ? first + SUMMED_BY_QUERY : count;
        Floats some[TOGETHER][2] = {};
        for (long k = first; k < last; k++)
            for (long v = 0; v < vectors; v++) {
                Floats row = load(rows, format, k * stride + i + v * WIDTH, n);
                for (long g = 0; g < queries; g++)
                    some[g][v] += row * factors[g * factor_stride + k];
            }
        for (long g = 0; g < queries; g++)
            for (long v = 0; v < vectors; v++)
                sums[g][v] += some[g][v];
    }
    for (long g = 0; g < queries; g++)
        for (long v = 0; v < vectors; v++) {
            float *to = result + g * result_stride + i + v * WIDTH;
            store(to, 0, 0, n, adds ? load(to, 0, 0, n) + sums[g][v] : sums[g][v]);
        }
}

/* The same for all i below `size`. */
INLINE void product(const long queries, const int adds, long count, const float *factors,
                    long factor_stride, const void *rows, int format, long stride, long size,
                    float *result, long result_stride)
{
    long pairs = size / (2 * WIDTH) * (2 * WIDTH);
    for (long i = 0; i < pairs; i += 2 * WIDTH)
        product_at(queries, 2, adds, count, factors, factor_stride, rows, format, stride, result,
                   result_stride, i, WIDTH);
    VECTORS(pairs, size, {
        product_at(queries, 1, adds, count, factors, factor_stride, rows, format, stride, result,
                   result_stride, i, n);
    });
}

/* For some queries [queries, dim] of a key head; work holds queries * (2 * dim + columns). */
INLINE void attend_head(const long queries, long dim, float scale, const void *q, Seen prompt,
                        Seen own, void *result, int format, float *work)
{
    long columns = prompt.tokens + own.tokens, behind = prompt.tokens;
    float *wide = work, *mixed = work + queries * dim, *weights = mixed + queries * dim;
    VECTORS(0, queries * dim, { store(wide, 0, i, n, load(q, format, i, n)); });
    product(queries, 0, dim, wide, dim, prompt.keys, format, prompt.stride, prompt.tokens,
            weights, columns);
    product(queries, 0, dim, wide, dim, own.keys, format, own.stride, own.tokens,
            weights + behind, columns);
    VECTORS(0, queries * columns, { store(weights, 0, i, n, load(weights, 0, i, n) * scale); });
    for (long g = 0; g < queries; g++)
        softmax_row(columns, columns, weights + g * columns, 0, weights + g * columns);
    product(queries, 0, prompt.tokens, weights, columns, prompt.values, format, dim, dim, mixed,
            dim);
    product(queries, 1, own.tokens, weights + behind, columns, own.values, format, dim, dim,
            mixed, dim);
    VECTORS(0, queries * dim, { store(result, format, i, n, load(mixed, 0, i, n)); });
}

INLINE void attend_some(long queries, long dim, float scale, const void *q, Seen prompt, Seen own,
                        void *result, int format, float *work)
{
    switch (queries) {
    case 1: attend_head(1, dim, scale, q, prompt, own, result, format, work); break;
    case 2: attend_head(2, dim, scale, q, prompt, own, result, format, work); break;
    case 3: attend_head(3, dim, scale, q, prompt, own, result, format, work); break;
    default: attend_head(4, dim, scale, q, prompt, own, result, format, work);
    }
}

/* Attention of one token a row, whose key is the last of its own. q and result are [rows, key_heads,
 * group, dim], q's rows `stride` apart; prompts' keys [prompts, key_heads, dim, width] and values
 * [prompts, key_heads, width, dim], of which `lengths` are seen; those of rows alike, with `room` for
 * as many tokens and `drawn` of them seen. Work holds `work_size` numbers for each thread. */
void attend(long rows, long key_heads, long group, long dim, long stride, const void *q,
            float scale, const int64_t *prompt_of_row, const int64_t *lengths, long width,
            const void *prompt_keys, const void *prompt_values, long drawn, long room,
            const void *own_keys, const void *own_values, void *result, int format, float *work,
            long work_size, int threads)
{
    ROWS
    for (long task = 0; task < rows * key_heads; task++) {
        long row = task / key_heads, head = task % key_heads;
        long shared = prompt_of_row[row] * key_heads + head;
        Seen prompt = {at(prompt_keys, format, shared * dim * width),
                       at(prompt_values, format, shared * width * dim),
                       lengths[prompt_of_row[row]], width};
        Seen own = {at(own_keys, format, task * dim * room),
                    at(own_values, format, task * room * dim), drawn, room};
        float *space = work + omp_get_thread_num() * work_size;
        for (long first = 0; first < group; first += TOGETHER) {
            long queries = group - first < TOGETHER ? group - first : TOGETHER;
            const void *some = at(q, format, row * stride + (head * group + first) * dim);
            void *found = at(result, format, (task * group + first) * dim);
            format ? attend_some(queries, dim, scale, some, prompt, own, found, 1, space)
                   : attend_some(queries, dim, scale, some, prompt, own, found, 0, space);
        }
    }
}

/* Of x, logits over the temperature: the greatest, the sum of exp(x - greatest), and the sum of
 * these times x - greatest, to which a logit of -inf adds nothing. */
INLINE void partition_row(long size, const void *logits, int format, float inverse, float *most,
                          double *total, double *product)
{
    Floats greatest = all(-INFINITY);
    VECTORS(0, size, {
        greatest = greater(first_of(load(logits, format, i, n), n, greatest), greatest);
    });
    *most = greatest_of(greatest) * inverse;
    greatest = all(*most);
    *total = *product = 0.;
    for (long first = 0; first < size; first += SUMMED) {
        long last = first + SUMMED < size ? first + SUMMED : size;
        Floats sum = {}, along = {};
        VECTORS(first, last, {
            Floats shifted = load(logits, format, i, n) * inverse - greatest;
            Floats some = first_of(exponential(shifted), n, all(0.f));
            sum += some;
            along += chosen(some == 0.f, all(0.f), some * shifted);
        });
        *total += sum_of(sum);
        *product += sum_of(along);
    }
}

void token_logprobs(long rows, long size, const void *logits, int format, const int64_t *targets,
                    float temperature, float *greatest, float *totals, float *logprobs,
                    float *entropies, int threads)
{
    float inverse = 1.f / temperature;
    ROWS
    for (long row = 0; row < rows; row++) {
        const void *x = at(logits, format, row * size);
        double total, product;
        if (format)
            partition_row(size, x, 1, inverse, greatest + row, &total, &product);
        else
            partition_row(size, x, 0, inverse, greatest + row, &total, &product);
        float log_total = (float)log(total), target = load(x, format, targets[row], 1)[0] * inverse;
        totals[row] = (float)total;
        logprobs[row] = target - greatest[row] - log_total;
        entropies[row] = log_total - (float)(product / total);
    }
}

/* Overwrites logits with (onehot - softmax) / temperature, times upstream. */
INLINE void logits_backward_row(long size, void *logits, int format, long target, float inverse,
                                float most, float total, float upstream)
{
    float scaled = upstream * inverse, factor = scaled / total;
    Floats of_target = exponential(load(logits, format, target, 1) * inverse - most);
    VECTORS(0, size, {
        Floats some = exponential(load(logits, format, i, n) * inverse - most);
        store(logits, format, i, n, some * -factor);
    });
    store(logits, format, target, 1, scaled - of_target * factor);
}

void token_logprobs_backward(long rows, long size, void *logits, int format, const int64_t *targets,
                             float temperature, const float *greatest, const float *totals,
                             const float *upstream, int threads)
{
    float inverse = 1.f / temperature;
    ROWS
    for (long row = 0; row < rows; row++) {
        void *x = at(logits, format, row * size);
        if (format)
            logits_backward_row(size, x, 1, targets[row], inverse, greatest[row], totals[row],
                                upstream[row]);
        else
            logits_backward_row(size, x, 0, targets[row], inverse, greatest[row], totals[row],
                                upstream[row]);
    }
}

typedef uint16_t Eight __attribute__((vector_size(16)));
#if defined(__clang__)
#define SHUFFLED(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define SHUFFLED(one, other, ...) __builtin_shuffle(one, other, (Eight){__VA_ARGS__})
#endif

/* Interleaved with row i + 4, three times, row i and column j of 8 x 8 numbers change places. */
INLINE void transpose_eight(const uint16_t *from, long stride, uint16_t *to, long to_stride)
{
    Eight rows[8], mixed[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        memcpy(rows + i, from + i * stride, sizeof *rows);
#pragma GCC unroll 3
    for (int round = 0; round < 3; round++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            mixed[2 * i] = SHUFFLED(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            mixed[2 * i + 1] = SHUFFLED(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            rows[i] = mixed[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        memcpy(to + i * to_stride, rows + i, sizeof *rows);
}

/* `result` [columns, rows] of bfloat16 [rows, columns], whose rows lie `stride` apart. A tile goes
 * through a buffer: written to where it belongs, number by number, it would thrash the cache. */
void transpose(long rows, long columns, long stride, const uint16_t *states, uint16_t *result,
               int threads)
{
    enum { SIDE = 64 };
    ROWS
    for (long column = 0; column < columns; column += SIDE) {
        long broad = columns - column < SIDE ? columns - column : SIDE;
        for (long row = 0; row < rows; row += SIDE) {
            long tall = rows - row < SIDE ? rows - row : SIDE;
            const uint16_t *from = states + row * stride + column;
            uint16_t tile[SIDE][SIDE];
            for (long i = 0; i < tall / 8 * 8; i += 8)
                for (long j = 0; j < broad / 8 * 8; j += 8)
                    transpose_eight(from + i * stride + j, stride, &tile[j][i], SIDE);
            for (long i = 0; i < tall; i++)
                for (long j = i < tall / 8 * 8 ? broad / 8 * 8 : 0; j < broad; j++)
                    tile[j][i] = from[i * stride + j];
            for (long j = 0; j < broad; j++)
                memcpy(result + (column + j) * rows + row, tile[j], 2 * (size_t)tall);
        }
    }
}
