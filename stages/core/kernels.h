/* What `decode` puts together; said where they are defined. */
#ifndef KERNELS_H
#define KERNELS_H
#include <stdint.h>

void rms_norm(long rows, long size, const float *states, const float *weight, float epsilon,
              void *result, int format, float *scales, int threads);
void gated(long rows, long size, long stride, const void *gate, const void *up, void *result,
           int format, int threads);
void add(long count, float *total, const void *part, int format, int threads);
void attend(long rows, long key_heads, long group, long dim, long stride, const void *q,
            float scale, const int64_t *prompt_of_row, const int64_t *lengths, long width,
            const void *prompt_keys, const void *prompt_values, long drawn, long room,
            const void *own_keys, const void *own_values, void *result, int format, float *work,
            long work_size, int threads);
void multiply(long rows, long size, long columns, const void *states, const void *panels,
              const float *bias, int adds, void *result, int format, int threads);

#endif
