/* Products of small float32 matrices. */

#include "transpose.h"

enum { BLOCK = WIDE / 2 };

/* A matrix by the strides of its rows and columns. */
typedef struct {
    const float *p;
    int64_t row, column;
} Left;

/* Some rows and vectors of to = factor from + a b, whose sums are in registers. */
INLINE void product_block(Rows to, float factor, Rows from, Left a, Rows b, int64_t i, int64_t j,
                          int64_t inner, const int rows, const int vectors)
{
    const float *a_i = a.p + i * a.row, *b_j = b.p + j;
    Wide sums[2 * BLOCK][2];
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < vectors; x++) {
            sums[r][x] = (Wide){0};
            if (from.p) sums[r][x] = WIDE_AT(from.p + (i + r) * from.row + j, x * WIDE) * factor;
        }
    for (int64_t l = 0; l < inner; l++) {
        Wide b_l[2];
        for (int x = 0; x < vectors; x++) b_l[x] = WIDE_AT(b_j + l * b.row, x * WIDE);
        for (int r = 0; r < rows; r++)
            for (int x = 0; x < vectors; x++)
                sums[r][x] += b_l[x] * a_i[r * a.row + l * a.column];
    }
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < vectors; x++)
            WIDE_AT(to.p + (i + r) * to.row + j, x * WIDE) = sums[r][x];
}

/* to = factor from + a b, of [m, n], [m, inner] and [inner, n]; m and n are multiples of 16.
   `from` may be `to`, or NULL for zeros. */
INLINE void product(Rows to, float factor, Rows from, Left a, Rows b, int64_t m, int64_t n,
                    int64_t inner)
{
    int64_t j = 0;
    for (; j + 2 * WIDE <= n; j += 2 * WIDE)
        for (int64_t i = 0; i < m; i += BLOCK)
            product_block(to, factor, from, a, b, i, j, inner, BLOCK, 2);
    for (; j < n; j += WIDE)
        for (int64_t i = 0; i < m; i += 2 * BLOCK)
            product_block(to, factor, from, a, b, i, j, inner, 2 * BLOCK, 1);
}
