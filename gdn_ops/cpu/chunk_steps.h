/* The steps of a chunk, forwards and back, on some rows of a state: the formulas are in
   chunk_backward.c. A matrix has a row for each token, one with a name in _T a column. */

#include "products.h"

enum { CHUNK = 16, PANEL = 64, PAIRS = CHUNK * CHUNK };

/* What a task has beside `Scratch`. Tokens of a chunk that the sequence has not are zero. */
typedef struct {
    Scratch tokens;
    float *kq_by_channel, *dkq; /* [chunks, width, 2, CHUNK]: keys, then queries; their gradients */
    float *pairs, *dpairs;      /* [chunks, 2, CHUNK, CHUNK]: <k_i, k_j>, <q_i, k_j>; the same */
    float *dgates;              /* [R, capacity, 2] */
    float *states, *G;          /* [chunks, width, panel], [width, panel] */
    float *x;                   /* [capacity, panel] */
    int64_t panel;              /* rows of the states, in whole lines */
} Room;

/* Of one chunk and value head. */
typedef struct {
    ALIGNED float from_start[CHUNK], to_end[CHUNK], beta[CHUNK];
    float D[CHUNK][CHUNK], KK[CHUNK][CHUNK], QK[CHUNK][CHUNK];
} Gates;

static int64_t chunks_of(int64_t tokens)
{
    return (tokens + CHUNK - 1) / CHUNK;
}

static float *dpairs_of(const Room *w, int64_t chunk)
{
    return w->dpairs + chunk * 2 * PAIRS;
}

/* Decays, each a product of those of single tokens, and the products of keys and queries. */
static void find_gates(const Room *w, int64_t chunk, int64_t r, Gates *of)
{
    const float *gates = w->tokens.gates + (r * w->tokens.capacity + chunk * CHUNK) * 2;
    const float *pairs = w->pairs + chunk * 2 * PAIRS;
    static const float identity[2 * CHUNK] = {[CHUNK] = 1};
    float decay = 1;
    for (int i = 0; i < CHUNK; i++) {
        decay *= gates[2 * i];
        of->from_start[i] = decay;
        of->beta[i] = gates[2 * i + 1];
    }
    for (int j = 0; j < CHUNK; j += WIDE) {
        Wide D = {0};
        for (int i = 0; i < CHUNK; i++) {
            D *= gates[2 * i];
            WIDE_AT(of->KK[i], j) = D * WIDE_AT(pairs + i * CHUNK, j);
            D += WIDE_AT(identity + CHUNK - i, j);
            WIDE_AT(of->D[i], j) = D;
            WIDE_AT(of->QK[i], j) = D * WIDE_AT(pairs + PAIRS + i * CHUNK, j);
        }
        WIDE_AT(of->to_end, j) = D;
    }
}

/* x of a chunk, from v in `x`, and t u; S is the state before it. */
static void solve(const Room *w, const Gates *of, const float *k_T, float *S, float *x, float *u)
{
    int64_t width = w->tokens.width, P = w->panel;
    ALIGNED float S_k[CHUNK * PANEL];
    product((Rows){S_k, P}, 0, (Rows){0}, (Left){k_T, 1, 2 * CHUNK}, (Rows){S, P}, CHUNK, P,
            width);
    for (int64_t j = 0; j < P; j += WIDE) {
        Wide of_x[CHUNK];
        for (int i = 0; i < CHUNK; i++)
            of_x[i] = WIDE_AT(x + i * P, j) - WIDE_AT(S_k + i * P, j) * of->from_start[i];
        for (int i = 0; i < CHUNK; i++) {
            Wide u_i = of_x[i] * of->beta[i];
            WIDE_AT(x + i * P, j) = of_x[i];
            WIDE_AT(u + i * P, j) = u_i * of->to_end[i];
            for (int l = i + 1; l < CHUNK; l++) of_x[l] -= u_i * of->KK[l][i];
        }
    }
}

/* y of a chunk, and e beside do in `rows`, [CHUNK, 2, panel]. */
static void solve_back(const Room *w, const Gates *of, const float *k_T, float *rows,
                               float *y)
{
    int64_t width = w->tokens.width, P = w->panel;
    product((Rows){y, P}, 0, (Rows){0}, (Left){k_T, 1, 2 * CHUNK}, (Rows){w->G, P}, CHUNK, P,
            width);
    for (int i = 0; i < CHUNK; i++)
        for (int64_t j = 0; j < P; j++) y[i * P + j] *= of->to_end[i];
    product((Rows){y, P}, 1, (Rows){y, P}, (Left){of->QK[0], 1, CHUNK}, (Rows){rows + P, 2 * P},
            CHUNK, P, CHUNK);
    for (int64_t j = 0; j < P; j += WIDE) {
        Wide of_y[CHUNK];
        for (int i = 0; i < CHUNK; i++) of_y[i] = WIDE_AT(y + i * P, j);
        for (int i = CHUNK - 1; i >= 0; i--) {
            Wide e = of_y[i] * of->beta[i];
            WIDE_AT(y + i * P, j) = of_y[i];
            WIDE_AT(rows + 2 * i * P, j) = e;
            for (int l = 0; l < i; l++) of_y[l] -= e * of->KK[i][l];
        }
    }
}

/* What a chunk's products of keys and queries, and its gates, have of the products of y and of do
   with u, and of `of_end`, <t_i G^T u_i, k_i>. dG has what the decays from the start have. */
static void add_pairs(const Gates *of, const float *y_u, const float *do_u, const float *of_end,
                      float of_state, float *dG, float *dpairs, float *dgates)
{
    ALIGNED float terms[CHUNK][CHUNK], by_column[CHUNK][CHUNK];
    for (int j = 0; j < CHUNK; j += WIDE) {
        Wide columns = {0};
        for (int i = 0; i < CHUNK; i++) {
            Wide D = WIDE_AT(of->D[i], j), of_o = WIDE_AT(do_u + i * CHUNK, j);
            Wide of_v = WIDE_AT(y_u + i * CHUNK, j) * of->beta[i];
            Wide term = WIDE_AT(of->QK[i], j) * of_o - WIDE_AT(of->KK[i], j) * of_v;
            WIDE_AT(terms[i], j) = term;
            columns += term;
            WIDE_AT(dpairs + i * CHUNK, j) -= D * of_v;
            WIDE_AT(dpairs + PAIRS + i * CHUNK, j) += D * of_o;
        }
        WIDE_AT(dG, j) -= columns;
    }
    transpose((Rows){by_column[0], CHUNK}, (Rows){terms[0], CHUNK}, CHUNK, CHUNK);
    for (int j = 0; j < CHUNK; j += WIDE) {
        Wide rows = {0};
        for (int i = 0; i < CHUNK; i++) rows += WIDE_AT(by_column[i], j);
        WIDE_AT(dG, j) += rows;
    }
    for (int i = 0; i < CHUNK; i++) of_state += of_end[i];
    /* A log decay is in all sums from it on. */
    for (int i = CHUNK - 1; i >= 0; i--) {
        of_state += dG[i] - of_end[i];
        dgates[2 * i] += of_state;
    }
}

/* A chunk backwards: G, the gradients of its values, and what the others have of these rows of the
   state. `rows`, [CHUNK, 2, panel], has do in its second half; the first becomes dv. */
static void retreat(const Room *w, const Gates *of, int64_t chunk, const float *x, float *rows,
                    float *dgates)
{
    int64_t width = w->tokens.width, P = w->panel;
    const float *kq = w->tokens.kq + chunk * CHUNK * 2 * width;
    const float *by_channel = w->kq_by_channel + chunk * 2 * width * CHUNK;
    float *S = w->states + chunk * width * P, *dkq = w->dkq + chunk * 2 * width * CHUNK;
    ALIGNED float y[CHUNK * PANEL], x_T[PANEL * CHUNK], y_T[PANEL * CHUNK], do_T[PANEL * CHUNK];
    ALIGNED float u_T[PANEL * CHUNK], tu_T[PANEL * CHUNK], y_u[PAIRS], do_u[PAIRS];
    ALIGNED float scaled_T[PANEL * 2 * CHUNK]; /* columns -d_i e_i, then d_i do_i */
    ALIGNED float from_S[MAX_K * 2 * CHUNK], from_G[MAX_K * CHUNK], scaled[2 * CHUNK * PANEL];
    float dG[CHUNK], of_end[CHUNK], dbeta[CHUNK], of_state = 0;

    solve_back(w, of, by_channel, rows, y);
    transpose((Rows){x_T, CHUNK}, (Rows){(float *)x, P}, CHUNK, P);
    transpose((Rows){y_T, CHUNK}, (Rows){y, P}, CHUNK, P);
    transpose((Rows){do_T, CHUNK}, (Rows){rows + P, 2 * P}, CHUNK, P);
    for (int i = 0; i < CHUNK; i += WIDE) {
        Wide beta = WIDE_AT(of->beta, i), from_start = WIDE_AT(of->from_start, i), sum = {0};
        for (int64_t at = i; at < P * CHUNK; at += CHUNK) {
            Wide of_y = WIDE_AT(y_T, at), of_x = WIDE_AT(x_T, at);
            sum += of_y * of_x;
            WIDE_AT(scaled_T, 2 * at - i) = of_y * beta * -from_start;
            WIDE_AT(scaled_T, 2 * at - i + CHUNK) = WIDE_AT(do_T, at) * from_start;
            WIDE_AT(u_T, at) = of_x * beta;
            WIDE_AT(tu_T, at) = of_x * beta * WIDE_AT(of->to_end, i);
        }
        WIDE_AT(dbeta, i) = sum;
    }
    product((Rows){y_u, CHUNK}, 0, (Rows){0}, (Left){y_T, 1, CHUNK}, (Rows){u_T, CHUNK}, CHUNK,
            CHUNK, P);
    product((Rows){do_u, CHUNK}, 0, (Rows){0}, (Left){do_T, 1, CHUNK}, (Rows){u_T, CHUNK}, CHUNK,
            CHUNK, P);
    product((Rows){from_S, 2 * CHUNK}, 0, (Rows){0}, (Left){S, P, 1}, (Rows){scaled_T, 2 * CHUNK},
            width, 2 * CHUNK, P);
    product((Rows){from_G, CHUNK}, 0, (Rows){0}, (Left){w->G, P, 1}, (Rows){tu_T, CHUNK}, width,
            CHUNK, P);
    for (int i = 0; i < CHUNK; i += WIDE) {
        Wide of_gates = {0}, of_key = {0};
        for (int64_t j = 0; j < width; j++) {
            const float *kq_j = by_channel + j * 2 * CHUNK + i, *of_S = from_S + j * 2 * CHUNK + i;
            float *dkq_j = dkq + j * 2 * CHUNK + i;
            Wide of_G = WIDE_AT(from_G + j * CHUNK, i), dk = WIDE_AT(of_S, 0), k = WIDE_AT(kq_j, 0);
            Wide dq = WIDE_AT(of_S, CHUNK);
            of_gates += k * dk + WIDE_AT(kq_j, CHUNK) * dq;
            of_key += k * of_G;
            WIDE_AT(dkq_j, 0) += dk + of_G;
            WIDE_AT(dkq_j, CHUNK) += dq;
        }
        WIDE_AT(dG, i) = of_gates;
        WIDE_AT(of_end, i) = of_key;
    }
    Wide G_S[2] = {{0}};
    for (int64_t j = 0; j < width * P; j += 2 * WIDE)
        for (int i = 0; i < 2; i++)
            G_S[i] += WIDE_AT(w->G + j, i * WIDE) * WIDE_AT(S + j, i * WIDE);
    for (int i = 0; i < WIDE; i++) of_state += G_S[0][i] + G_S[1][i];
    add_pairs(of, y_u, do_u, of_end, of_state * of->from_start[CHUNK - 1], dG, dpairs_of(w, chunk),
              dgates);
    for (int i = 0; i < CHUNK; i++) {
        dgates[2 * i + 1] += dbeta[i];
        for (int64_t j = 0; j < P; j++) {
            scaled[2 * i * P + j] = -of->from_start[i] * rows[2 * i * P + j];
            scaled[(2 * i + 1) * P + j] = of->from_start[i] * rows[(2 * i + 1) * P + j];
        }
    }
    product((Rows){w->G, P}, of->from_start[CHUNK - 1], (Rows){w->G, P}, (Left){kq, 1, width},
            (Rows){scaled, P}, width, P, 2 * CHUNK);
}
