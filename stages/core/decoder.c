/* One token of each row through all layers of a decoder as Llama has it: what
 * `stages.rollout.fused_decoder` does by calls for each part, in one call for all of them. */
#include "vectors.h"

#include "kernels.h"

/* Weights in panels, as `multiply` reads them; biases may be NULL. Keys and values are as `attend`
 * has them. */
typedef struct {
    const float *norm, *mlp_norm;
    const void *qkv, *output, *gate_and_up, *down;
    const float *qkv_bias, *output_bias, *gate_and_up_bias, *down_bias;
    const void *prompt_keys, *prompt_values;
    void *own_keys, *own_values;
    float epsilon, mlp_epsilon, scale;
} Layer;

/* Sizes of a batch, and room for what the parts give to each other: `normed` and `found` [rows,
 * hidden], `wide` [rows, all heads * dim, or 2 * inner], `mixed` [rows, query heads * dim, or inner],
 * `scales` [rows], `work` [threads, work_size]. */
typedef struct {
    long rows, hidden, key_heads, group, dim, inner;
    long width, drawn, room; /* tokens of prompts and of rows, and what these have room for */
    const int64_t *prompt_of_row, *lengths;
    const float *turns; /* [rows, dim / 2, 2]: cosines and sines of the tokens' positions */
    void *normed, *found, *wide, *mixed;
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

/* Turn queries where they are, and put keys and values of the new token behind those of the row. */
INLINE void keep_row(const Batch *batch, const Layer *layer, long row, void *heads, int format)
{
    long dim = batch->dim, last = batch->drawn - 1;
    const float *turns = batch->turns + row * dim;
    void *keys = at(heads, format, batch->key_heads * batch->group * dim);
    void *values = at(keys, format, batch->key_heads * dim);
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

/* states [rows, hidden] become what the layers make of them. */
void decode(long num_layers, const Layer *layers, const Batch *batch, float *states, int format,
            int threads)
{
    long rows = batch->rows, hidden = batch->hidden, inner = batch->inner;
    long mixed = batch->key_heads * batch->group * batch->dim;
    long heads = mixed + 2 * batch->key_heads * batch->dim;
    int some = threads_for(rows * hidden, threads), many = threads_for(rows * hidden * hidden, threads);
    for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
        rms_norm(rows, hidden, states, layer->norm, layer->epsilon, batch->normed, format,
                 batch->scales, some);
        multiply(rows, hidden, heads, batch->normed, layer->qkv, layer->qkv_bias, batch->wide, format,
                 many);
        keep(batch, layer, format, some);
        attend(rows, batch->key_heads, batch->group, batch->dim, heads, batch->wide, layer->scale,
               batch->prompt_of_row, batch->lengths, batch->width, layer->prompt_keys,
               layer->prompt_values, batch->drawn, batch->room, layer->own_keys, layer->own_values,
               batch->mixed, format, batch->work, batch->work_size,
               threads_for(rows * heads * (batch->width + batch->drawn) / batch->dim, threads));
        multiply(rows, mixed, hidden, batch->mixed, layer->output, layer->output_bias, batch->found,
                 format, many);
        add(rows * hidden, states, batch->found, format, some);
        rms_norm(rows, hidden, states, layer->mlp_norm, layer->mlp_epsilon, batch->normed, format,
                 batch->scales, some);
        multiply(rows, hidden, 2 * inner, batch->normed, layer->gate_and_up, layer->gate_and_up_bias,
                 batch->wide, format, many);
        gated(rows, inner, 2 * inner, batch->wide, at(batch->wide, format, inner), batch->mixed,
              format, some);
        multiply(rows, inner, hidden, batch->mixed, layer->down, layer->down_bias, batch->found, format,
                 many);
        add(rows * hidden, states, batch->found, format, some);
    }
}
