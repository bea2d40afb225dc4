/* The steps of a chunk, forwards and back, on some rows of a state: the formulas are in
   chunk_backward.c. A matrix has a row for each token, one with a name in _T a column. Sizes are
   arguments so that the compiler can know them. */

#include "products.h"

enum { CHUNK = 16, PANEL = 64, PAIRS = CHUNK * CHUNK };

/* Of one chunk and value head. KK is D <k_i, k_j>, times beta_j or beta_i; QK D <q_i, k_j>. */
typedef struct {
    ALIGNED float from_start[CHUNK], to_end[CHUNK], beta[CHUNK];
    float D[CHUNK][CHUNK], KK_beta[CHUNK][CHUNK], beta_KK[CHUNK][CHUNK], QK[CHUNK][CHUNK];
} Gates;

/* Of one chunk: keys and queries; <k_i, k_j> without the diagonal, and <q_i, k_j>; gradients of
   both. Tokens that the sequence has not are zero. */
typedef struct {
    float *kq, *kq_T, *pairs; /* [CHUNK, 2, width], [width, 2, CHUNK], [2, CHUNK, CHUNK] */
    float *dkq_T, *dpairs;    /* as kq_T and pairs */
} Chunk;

/* Decays, each a product of those of single tokens, and the products of keys and queries. `gates`
   are a decay and a beta of each token. */
static void find_gates(const float *gates, const float *pairs, Gates *of)
{
    static const float identity[2 * CHUNK] = {[CHUNK] = 1};
    float decay = 1;
    for (int i = 0; i < CHUNK; i++) {
        decay *= gates[2 * i];
        of->from_start[i] = decay;
        of->beta[i] = gates[2 * i + 1];
    }
    for (int j = 0; j < CHUNK; j += WIDE) {
        Wide D = {0}, beta = WIDE_AT(of->beta, j);
        for (int i = 0; i < CHUNK; i++) {
            D = D * gates[2 * i] + WIDE_AT(identity + CHUNK - i, j);
            Wide KK = D * WIDE_AT(pairs + i * CHUNK, j);
            WIDE_AT(of->D[i], j) = D;
            WIDE_AT(of->KK_beta[i], j) = KK * beta;
            WIDE_AT(of->beta_KK[i], j) = KK * gates[2 * i + 1];
            WIDE_AT(of->QK[i], j) = D * WIDE_AT(pairs + PAIRS + i * CHUNK, j);
        }
        WIDE_AT(of->to_end, j) = D;
    }
}

/* x of a chunk, from v in `x`, and t u; S is the state before it. */
INLINE void solve(const Chunk *w, const Gates *of, float *S, float *x, float *u,
                  const int64_t width, const int64_t P)
{
    ALIGNED float S_k[CHUNK * PANEL];
    product((Rows){S_k, P}, 0, (Rows){0}, (Left){w->kq_T, 1, 2 * CHUNK}, (Rows){S, P}, CHUNK, P,
            width);
    for (int64_t j = 0; j < P; j += WIDE) {
        Wide of_x[CHUNK];
        for (int i = 0; i < CHUNK; i++)
            of_x[i] = WIDE_AT(x + i * P, j) - WIDE_AT(S_k + i * P, j) * of->from_start[i];
        for (int i = 0; i < CHUNK; i++) {
            WIDE_AT(x + i * P, j) = of_x[i];
            WIDE_AT(u + i * P, j) = of_x[i] * (of->beta[i] * of->to_end[i]);
            for (int l = i + 1; l < CHUNK; l++) of_x[l] -= of_x[i] * of->KK_beta[l][i];
        }
    }
}

/* y of a chunk, and e beside do in `rows`, [CHUNK, 2, panel]; in `scaled` -d e and d do. */
INLINE void solve_back(const Chunk *w, const Gates *of, float *G, float *rows, float *y,
                       float *scaled, const int64_t width, const int64_t P)
{
    product((Rows){y, P}, 0, (Rows){0}, (Left){w->kq_T, 1, 2 * CHUNK}, (Rows){G, P}, CHUNK, P,
            width);
    for (int i = 0; i < CHUNK; i++)
        for (int64_t j = 0; j < P; j += WIDE) WIDE_AT(y + i * P, j) *= of->to_end[i];
    product((Rows){y, P}, 1, (Rows){y, P}, (Left){of->QK[0], 1, CHUNK}, (Rows){rows + P, 2 * P},
            CHUNK, P, CHUNK);
    for (int64_t j = 0; j < P; j += WIDE) {
        Wide of_y[CHUNK];
        for (int i = 0; i < CHUNK; i++) of_y[i] = WIDE_AT(y + i * P, j);
        for (int i = CHUNK - 1; i >= 0; i--) {
            Wide e = of_y[i] * of->beta[i];
            WIDE_AT(y + i * P, j) = of_y[i];
            WIDE_AT(rows + 2 * i * P, j) = e;
            WIDE_AT(scaled + 2 * i * P, j) = e * -of->from_start[i];
            WIDE_AT(scaled + (2 * i + 1) * P, j) =
                WIDE_AT(rows + (2 * i + 1) * P, j) * of->from_start[i];
            for (int l = 0; l < i; l++) of_y[l] -= of_y[i] * of->beta_KK[i][l];
        }
    }
}

/* What a chunk's products of keys and queries, and its gates, have of the products of y and of do
   with x, and of `of_end`, <t_i G^T u_i, k_i>. dG has what the decays from the start have. */
static void add_pairs(const Chunk *w, const Gates *of, const float *y_x, const float *do_x,
                      const float *of_end, float of_state, float *dG, float *dgates)
{
    ALIGNED float terms[CHUNK][CHUNK], by_column[CHUNK][CHUNK];
    for (int j = 0; j < CHUNK; j += WIDE) {
        Wide columns = {0}, beta = WIDE_AT(of->beta, j);
        for (int i = 0; i < CHUNK; i++) {
            Wide D = WIDE_AT(of->D[i], j), of_o = WIDE_AT(do_x + i * CHUNK, j) * beta;
            Wide of_v = WIDE_AT(y_x + i * CHUNK, j) * beta;
            Wide term = WIDE_AT(of->QK[i], j) * of_o - WIDE_AT(of->beta_KK[i], j) * of_v;
            WIDE_AT(terms[i], j) = term;
            columns += term;
            WIDE_AT(w->dpairs + i * CHUNK, j) -= D * of_v * of->beta[i];
            WIDE_AT(w->dpairs + PAIRS + i * CHUNK, j) += D * of_o;
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
        dgates[2 * i + 1] += y_x[i * CHUNK + i];
    }
}

/* A chunk backwards: G, the gradients of its values, and what the others have of these rows of the
   state. `rows`, [CHUNK, 2, panel], has do in its second half; the first becomes dv. */
INLINE void retreat(const Chunk *w, const Gates *of, const float *S, float *G, float *x,
                    float *rows, float *dgates, const int64_t width, const int64_t P)
{
    ALIGNED float y[CHUNK * PANEL], x_T[PANEL * CHUNK], rows_T[PANEL * 2 * CHUNK];
    ALIGNED float y_x[PAIRS], do_x[PAIRS], scaled[2 * CHUNK * PANEL];
    ALIGNED float from_S[MAX_K * 2 * CHUNK], from_G[MAX_K * CHUNK];
    float dG[CHUNK], of_end[CHUNK], of_state = 0;

    solve_back(w, of, G, rows, y, scaled, width, P);
    transpose((Rows){x_T, CHUNK}, (Rows){x, P}, CHUNK, P);
    transpose((Rows){rows_T, 2 * CHUNK}, (Rows){rows, 2 * P}, CHUNK, P);
    transpose((Rows){rows_T + CHUNK, 2 * CHUNK}, (Rows){rows + P, 2 * P}, CHUNK, P);
    product((Rows){y_x, CHUNK}, 0, (Rows){0}, (Left){y, P, 1}, (Rows){x_T, CHUNK}, CHUNK, CHUNK, P);
    product((Rows){do_x, CHUNK}, 0, (Rows){0}, (Left){rows + P, 2 * P, 1}, (Rows){x_T, CHUNK},
            CHUNK, CHUNK, P);
    product((Rows){from_S, 2 * CHUNK}, 0, (Rows){0}, (Left){S, P, 1}, (Rows){rows_T, 2 * CHUNK},
            width, 2 * CHUNK, P);
    product((Rows){from_G, CHUNK}, 0, (Rows){0}, (Left){G, P, 1}, (Rows){x_T, CHUNK}, width, CHUNK,
            P);
    for (int i = 0; i < CHUNK; i += WIDE) {
        Wide of_gates = {0}, of_key = {0}, d = WIDE_AT(of->from_start, i);
        Wide of_u = WIDE_AT(of->beta, i) * WIDE_AT(of->to_end, i);
        for (int64_t j = 0; j < width; j++) {
            const float *kq_j = w->kq_T + j * 2 * CHUNK + i, *of_S = from_S + j * 2 * CHUNK + i;
            float *dkq_j = w->dkq_T + j * 2 * CHUNK + i;
            Wide of_G = WIDE_AT(from_G + j * CHUNK, i) * of_u, k = WIDE_AT(kq_j, 0);
            Wide dk = -d * WIDE_AT(of_S, 0), dq = d * WIDE_AT(of_S, CHUNK);
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
            G_S[i] += WIDE_AT(G + j, i * WIDE) * WIDE_AT(S + j, i * WIDE);
    for (int i = 0; i < WIDE; i++) of_state += G_S[0][i] + G_S[1][i];
    add_pairs(w, of, y_x, do_x, of_end, of_state * of->from_start[CHUNK - 1], dG, dgates);
    product((Rows){G, P}, of->from_start[CHUNK - 1], (Rows){G, P}, (Left){w->kq, 1, width},
            (Rows){scaled, P}, width, P, 2 * CHUNK);
}
