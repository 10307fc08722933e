/* One token of each row through all layers of a decoder as Llama has it: what
 * `stages.rollout.fused_decoder` does by calls for each part, in one call for all of them. */
#include "vectors.h"

#include "kernels.h"

/* Weights in panels, as `multiply` reads them; bias may be NULL. An adapter's are [rank, size] and
 * [columns, rank]; of rank 0 there is none. */
typedef struct {
    const void *weight;
    const float *bias;
    const void *adapter_down, *adapter_up;
    long rank;
} Map;

typedef struct {
    const float *weight; /* NULL: there is no norm */
    float epsilon;
} Norm;

/* Keys and values are as `attend` has them. */
typedef struct {
    Norm norm, mlp_norm, q_norm, k_norm;
    Map qkv, output, gate_and_up, down;
    const void *prompt_keys, *prompt_values;
    void *own_keys, *own_values;
    float scale;
} Layer;

/* Sizes of a batch, and room for what the parts give to each other: `normed` and `found` [rows,
 * hidden], `wide` [rows, all heads * dim, or 2 * inner], `mixed` [rows, query heads * dim, or inner],
 * `low` [rows, the greatest rank], `scales` [rows], `work` [threads, work_size]. */
typedef struct {
    long rows, hidden, key_heads, group, dim, inner;
    long width, drawn, room; /* tokens of prompts and of rows, and what these have room for */
    const int64_t *prompt_of_row, *lengths;
    const float *turns; /* [rows, dim / 2, 2]: cosines and sines of the tokens' positions */
    void *normed, *found, *wide, *mixed, *low;
    float *scales, *work;
    long work_size;
} Batch;

/* As in torch: of fewer, waking another thread takes longer. */
const int elements_a_thread = 1 << 15;

static int threads_for(long elements, int threads)
{
    long most = elements / elements_a_thread + 1;
    return most < threads ? (int)most : threads;
}

/* Pairs (a, b) of a head, turned: (a cos - b sin, b cos + a sin). */
INLINE void turn(long dim, const void *states, const float *turns, void *result, int format)
{
    VECTORS(0, dim, {
        Floats x = load(states, format, i, n), t = load(turns, 0, i, n), y;
        for (int j = 0; j < WIDTH; j += 2) {
            y[j] = x[j] * t[j] - x[j + 1] * t[j + 1];
            y[j + 1] = x[j + 1] * t[j] + x[j] * t[j + 1];
        }
        store(result, format, i, n, y);
    });
}

/* Heads one after the other, normed where they are. */
INLINE void norm_heads(long heads, long dim, Norm norm, void *states, int format)
{
    if (!norm.weight)
        return;
    for (long head = 0; head < heads; head++) {
        void *one = at(states, format, head * dim);
        rms_norm_row(dim, one, format, norm.weight, norm.epsilon, one, format);
    }
}

/* Norm and turn queries and keys where they are, and put keys and values of the new token behind those
 * of the row. */
INLINE void keep_row(const Batch *batch, const Layer *layer, long row, void *heads, int format)
{
    long dim = batch->dim, last = batch->drawn - 1;
    const float *turns = batch->turns + row * dim;
    void *keys = at(heads, format, batch->key_heads * batch->group * dim);
    void *values = at(keys, format, batch->key_heads * dim);
    norm_heads(batch->key_heads * batch->group, dim, layer->q_norm, heads, format);
    norm_heads(batch->key_heads, dim, layer->k_norm, keys, format);
    for (long head = 0; head < batch->key_heads * (batch->group + 1); head++)
        turn(dim, at(heads, format, head * dim), turns, at(heads, format, head * dim), format);
    for (long head = 0; head < batch->key_heads; head++) {
        long place = row * batch->key_heads + head;
        for (long i = 0; i < dim; i++)
            memcpy(at(layer->own_keys, format, (place * dim + i) * batch->room + last),
                   at(keys, format, head * dim + i), format ? 2 : 4);
        memcpy(at(layer->own_values, format, (place * batch->room + last) * dim),
               at(values, format, head * dim), (size_t)dim * (format ? 2 : 4));
    }
}

static void keep(const Batch *batch, const Layer *layer, int format, int threads)
{
    long all_heads = batch->key_heads * (batch->group + 2) * batch->dim;
    ROWS
    for (long row = 0; row < batch->rows; row++) {
        void *heads = at(batch->wide, format, row * all_heads);
        format ? keep_row(batch, layer, row, heads, 1) : keep_row(batch, layer, row, heads, 0);
    }
}

static void norm_rows(const Batch *batch, Norm norm, const float *states, int format, int threads)
{
    rms_norm(batch->rows, batch->hidden, states, norm.weight, norm.epsilon, batch->normed, format,
             batch->scales, threads);
}

static void apply(const Batch *batch, const Map *map, long size, long columns, const void *states,
                  void *result, int format, int threads)
{
    multiply(batch->rows, size, columns, states, map->weight, map->bias, 0, result, format, threads);
    if (!map->rank)
        return;
    multiply(batch->rows, size, map->rank, states, map->adapter_down, NULL, 0, batch->low, format,
             threads);
    multiply(batch->rows, map->rank, columns, batch->low, map->adapter_up, NULL, 1, result, format,
             threads);
}

/* states [rows, hidden] become what the layers make of them. */
void decode(long num_layers, const Layer *layers, const Batch *batch, float *states, int format,
            int threads)
{
    long rows = batch->rows, hidden = batch->hidden, inner = batch->inner;
    long mixed = batch->key_heads * batch->group * batch->dim;
    long heads = mixed + 2 * batch->key_heads * batch->dim;
    int some = threads_for(rows * hidden, threads), many = threads_for(rows * hidden * hidden, threads);
    for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
        norm_rows(batch, layer->norm, states, format, some);
        apply(batch, &layer->qkv, hidden, heads, batch->normed, batch->wide, format, many);
        keep(batch, layer, format, some);
        attend(rows, batch->key_heads, batch->group, batch->dim, heads, batch->wide, layer->scale,
               batch->prompt_of_row, batch->lengths, batch->width, layer->prompt_keys,
               layer->prompt_values, batch->drawn, batch->room, layer->own_keys, layer->own_values,
               batch->mixed, format, batch->work, batch->work_size,
               threads_for(rows * heads * (batch->width + batch->drawn) / batch->dim, threads));
        apply(batch, &layer->output, mixed, hidden, batch->mixed, batch->found, format, many);
        add(rows * hidden, states, batch->found, format, some);
        norm_rows(batch, layer->mlp_norm, states, format, some);
        apply(batch, &layer->gate_and_up, hidden, 2 * inner, batch->normed, batch->wide, format, many);
        gated(rows, inner, 2 * inner, batch->wide, at(batch->wide, format, inner), batch->mixed,
              format, some);
        apply(batch, &layer->down, inner, hidden, batch->mixed, batch->found, format, many);
        add(rows * hidden, states, batch->found, format, some);
    }
}
