/* Matrices turned, eight rows and eight columns at a time. */

/* A matrix by the stride of its rows; those of its columns is 1. */
typedef struct {
    float *p;
    int64_t row;
} Rows;

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

/* Some rows of states that lie in memory from `at` on, or of their gradients. */
typedef struct {
    int64_t at, row, column, K, rows;
    int type;
} Place;

/* To `to`, [width, all]; what is not there, as all without `from`, is zero. */
static void load_turned(const void *from, Place s, Rows to, int64_t width, int64_t all)
{
    ALIGNED float some[LANES * MAX_K];
    for (int64_t i = 0; i < all; i += LANES) {
        memset(some, 0, LANES * width * sizeof(float));
        for (int64_t r = 0; from && r < least(s.rows - i, LANES); r++)
            load(some + r * width, from, s.at + (i + r) * s.row, s.column, s.K, s.type);
        transpose((Rows){to.p + i, to.row}, (Rows){some, width}, LANES, width);
    }
}

/* From `from`, [width, at least s.rows], where columns are next to each other. */
static void store_turned(void *to, Place s, Rows from, int64_t width)
{
    ALIGNED float some[LANES * MAX_K];
    for (int64_t i = 0; i < s.rows; i += LANES) {
        transpose((Rows){some, width}, (Rows){from.p + i, from.row}, width, LANES);
        for (int64_t r = 0; r < least(s.rows - i, LANES); r++)
            store(to, s.at + (i + r) * s.row, some + r * width, s.K, s.type);
    }
}
