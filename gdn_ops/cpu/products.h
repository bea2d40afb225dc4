/* Products of small float32 matrices whose rows lie in memory one after the other. */

#ifdef __AVX512F__
enum { WIDE = 16, BLOCK = 8 };
#else
enum { WIDE = 8, BLOCK = 4 };
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
#define WIDE_AT(p, j) (*(Wide *)((p) + (j)))

/* A matrix by its elements' strides, and one by its rows'. */
typedef struct {
    const float *p;
    int64_t row, column;
} Left;
typedef struct {
    float *p;
    int64_t row;
} Rows;

/* rows x columns numbers of to = factor from + a b, all of whose sums are in registers. */
static inline __attribute__((always_inline)) void
product_block(float *to, int64_t to_row, float factor, const float *from, int64_t from_row,
              const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
              int64_t inner, const int rows, const int vectors)
{
    Wide sums[2 * BLOCK][2];
    for (int i = 0; i < rows; i++)
        for (int x = 0; x < vectors; x++) {
            sums[i][x] = (Wide){0};
            if (from) sums[i][x] = WIDE_AT(from + i * from_row, x * WIDE) * factor;
        }
    for (int64_t l = 0; l < inner; l++) {
        Wide b_l[2];
        for (int x = 0; x < vectors; x++) b_l[x] = WIDE_AT(b + l * b_row, x * WIDE);
        for (int i = 0; i < rows; i++)
            for (int x = 0; x < vectors; x++) sums[i][x] += b_l[x] * a[i * a_row + l * a_column];
    }
    for (int i = 0; i < rows; i++)
        for (int x = 0; x < vectors; x++) WIDE_AT(to + i * to_row, x * WIDE) = sums[i][x];
}

/* to = factor from + a b, of [m, n], [m, inner] and [inner, n]; m and n are multiples of 16.
   `from` may be `to`, or NULL for zeros. */
static void product(Rows to, float factor, Rows from, Left a, Rows b, int64_t m, int64_t n,
                    int64_t inner)
{
    int64_t j = 0;
    for (; j + 2 * WIDE <= n; j += 2 * WIDE)
        for (int64_t i = 0; i < m; i += BLOCK)
            product_block(to.p + i * to.row + j, to.row, factor,
                          from.p ? from.p + i * from.row + j : NULL, from.row, a.p + i * a.row,
                          a.row, a.column, b.p + j, b.row, inner, BLOCK, 2);
    for (; j < n; j += WIDE)
        for (int64_t i = 0; i < m; i += 2 * BLOCK)
            product_block(to.p + i * to.row + j, to.row, factor,
                          from.p ? from.p + i * from.row + j : NULL, from.row, a.p + i * a.row,
                          a.row, a.column, b.p + j, b.row, inner, 2 * BLOCK, 1);
}

/* to [n, m] = from [m, n]^T; m and n are multiples of 8. */
static void transpose(Rows to, Rows from, int64_t m, int64_t n)
{
    for (int64_t i = 0; i < m; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            Vector x[LANES], y[LANES], z[LANES];
            for (int r = 0; r < LANES; r++) x[r] = AT(from.p + (i + r) * from.row, j);
            for (int r = 0; r < LANES; r += 2) {
                y[r] = SHUFFLE(x[r], x[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
                y[r + 1] = SHUFFLE(x[r], x[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
            }
            for (int r = 0; r < LANES; r += 4)
                for (int p = 0; p < 2; p++) {
                    z[r + 2 * p] = SHUFFLE(y[r + p], y[r + p + 2], 0, 1, 8, 9, 4, 5, 12, 13);
                    z[r + 2 * p + 1] = SHUFFLE(y[r + p], y[r + p + 2], 2, 3, 10, 11, 6, 7, 14, 15);
                }
            for (int r = 0; r < 4; r++) {
                AT(to.p + (j + r) * to.row, i) = SHUFFLE(z[r], z[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
                AT(to.p + (j + r + 4) * to.row, i) =
                    SHUFFLE(z[r], z[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
            }
        }
}
