/* The gradient of the gated delta rule on a CPU, token by token: of chunk and of recurrent.

   With G the gradient of the state after a token, S and S' the states before and after it, d its
   decay, x = v - d S k and u = beta x, from the last token to the first

       G  <- G + do q^T                  dq += S'^T do
       e   = beta G k                    dv  = e          dbeta = <G k, x>
       dk += G^T u - d S^T e             dg  = d <G, S> - <e, v - x>
       G  <- d (G - e k^T)

   A task is a sequence and key head. It walks ROWS rows of a state at a time, twice: forwards, and
   keeps every INTERVAL-th state; then backwards through the intervals, whose states are computed
   again. chunk_backward.py makes its `Call`; the arithmetic is float32. */

#include "recurrent_call.h"

enum { HALF = ROWS / 2 };

/* What a task has beside `Scratch`. A block is [width / LANES, ROWS, LANES], so that a loop over
   the channels of its rows has one address. */
typedef struct {
    Scratch tokens;
    float *dkq, *dgates; /* [T, 2, width], [R, T, 2]: of keys and queries as they were prepared */
    float *G, *states, *kept; /* a block, interval + 1 blocks, a block for each interval */
    float *x;                 /* [interval, ROWS] */
    int64_t block, interval;
} Room;

/* S k, x and the state after a token. */
static void advance(const float *from, float *to, int64_t width, Token a, const float *v, float *x)
{
    Vector sums[ROWS] = {0};
    float u[ROWS];
    for (int64_t j = 0; j < width; j += LANES)
        for (int r = 0; r < ROWS; r++) sums[r] += AT(from + j * ROWS, r * LANES) * AT(a.k, j);
    AT(x, 0) = AT(v, 0) - totals(sums) * a.decay;
    AT(u, 0) = AT(x, 0) * a.beta;
    for (int64_t j = 0; j < width; j += LANES)
        for (int r = 0; r < ROWS; r++) {
            Vector S = AT(from + j * ROWS, r * LANES) * a.decay;
            AT(to + j * ROWS, r * LANES) = S + AT(a.k, j) * u[r];
        }
}

/* A token backwards: G, and the gradients of its key, query, gates and values. */
static void retreat(float *G, const float *before, const float *after, int64_t width, Token a,
                    const float *v, const float *x, const float *d_o, float *dk, float *dq,
                    float *dgates, float *dv)
{
    /* Half of the rows at a time, whose sums the registers hold. */
    Vector sums[ROWS] = {0}, of_decay[HALF] = {0};
    float of_o[ROWS], u[ROWS], decayed[ROWS];
    memcpy(of_o, d_o, sizeof(of_o));
    for (int first = 0; first < ROWS; first += HALF)
        for (int64_t j = 0; j < width; j += LANES) {
            Vector k_j = AT(a.k, j), q_j = AT(a.q, j), dq_j = AT(dq, j);
            for (int r = first; r < first + HALF; r++) {
                Vector G_j = AT(G + j * ROWS, r * LANES) + q_j * of_o[r];
                AT(G + j * ROWS, r * LANES) = G_j;
                sums[r] += G_j * k_j;
                of_decay[r % HALF] += G_j * AT(before + j * ROWS, r * LANES);
                dq_j += AT(after + j * ROWS, r * LANES) * of_o[r];
            }
            AT(dq, j) = dq_j;
        }
    Vector G_k = totals(sums), e = G_k * a.beta;
    AT(dv, 0) = e;
    AT(u, 0) = AT(x, 0) * a.beta;
    AT(decayed, 0) = e * a.decay;
    Vector of_pairs = (of_decay[0] + of_decay[1]) + (of_decay[2] + of_decay[3]);
    dgates[0] += total(of_pairs * a.decay - e * (AT(v, 0) - AT(x, 0)));
    dgates[1] += total(G_k * AT(x, 0));
    for (int first = 0; first < ROWS; first += HALF)
        for (int64_t j = 0; j < width; j += LANES) {
            Vector k_j = AT(a.k, j), dk_j = AT(dk, j);
            for (int r = first; r < first + HALF; r++) {
                Vector G_j = AT(G + j * ROWS, r * LANES);
                dk_j += G_j * u[r];
                dk_j -= AT(before + j * ROWS, r * LANES) * decayed[r];
                AT(G + j * ROWS, r * LANES) = G_j * a.decay - k_j * decayed[r];
            }
            AT(dk, j) = dk_j;
        }
}

/* Rows `i_v` to `i_v + ROWS - 1` of a state, forwards and back. */
static void walk_back(const Call *c, const Room *w, const Sequence *s, int64_t n, int64_t r,
                      int64_t hv, int64_t i_v)
{
    int64_t K = c->K, width = w->tokens.width, rows = least(c->V - i_v, ROWS);
    int64_t interval = w->interval, bytes = w->block * sizeof(float);
    float v[ROWS] = {0}, d_o[ROWS] = {0}, dv[ROWS], row[MAX_K] = {0};
    float *S = w->states;
    memset(S, 0, bytes);
    memset(w->G, 0, bytes);
    for (int64_t i = 0; i < rows; i++) {
        if (s->has_state) {
            load(row, c->initial_state, first_row(c, s, hv, i_v + i), 1, K, c->state_type);
            for (int64_t j = 0; j < width; j += LANES) AT(S + j * ROWS, i * LANES) = AT(row, j);
        }
        int64_t at = n * c->dfinal_n + hv * c->dfinal_h + (i_v + i) * c->dfinal_v;
        if (!c->dfinal_state) continue;
        load(row, c->dfinal_state, at, c->dfinal_k, K, c->state_type);
        for (int64_t j = 0; j < width; j += LANES) AT(w->G + j * ROWS, i * LANES) = AT(row, j);
    }
    for (int64_t i = 0; i < s->length; i++) {
        if (i % interval == 0) memcpy(w->kept + i / interval * w->block, S, bytes);
        load_values(c, s->b, s->start + i, hv, i_v, rows, ROWS, v);
        advance(S, S, width, token_of(c, &w->tokens, i, r), v, w->x);
    }
    int64_t last = s->length ? (s->length - 1) / interval * interval : -1;
    for (int64_t first = last; first >= 0; first -= interval) {
        int64_t count = least(s->length - first, interval);
        memcpy(w->states, w->kept + first / interval * w->block, bytes);
        for (int64_t i = 0; i < count; i++) {
            float *state = w->states + i * w->block;
            load_values(c, s->b, s->start + first + i, hv, i_v, rows, ROWS, v);
            Token a = token_of(c, &w->tokens, first + i, r);
            advance(state, state + w->block, width, a, v, w->x + i * ROWS);
        }
        for (int64_t i = count - 1; i >= 0; i--) {
            int64_t t = s->start + first + i;
            float *state = w->states + i * w->block, *dk = w->dkq + (first + i) * 2 * width;
            load_values(c, s->b, t, hv, i_v, rows, ROWS, v);
            int64_t at = s->b * c->do_b + t * c->do_t + hv * c->do_h + i_v * c->do_v;
            load_rows(d_o, c->d_o, at, c->do_v, rows, ROWS, c->token_type);
            retreat(w->G, state, state + w->block, width, token_of(c, &w->tokens, first + i, r), v,
                    w->x + i * ROWS, d_o, dk, dk + width,
                    w->dgates + (r * w->tokens.capacity + first + i) * 2, dv);
            store_values(c, c->dv, s->b, t, hv, i_v, rows, ROWS, dv);
        }
    }
    int64_t at = ((n * c->HV + hv) * c->V + i_v) * K;
    for (int64_t i = 0; c->dinitial_state && i < rows; i++) {
        for (int64_t j = 0; j < width; j += LANES) AT(row, j) = AT(w->G + j * ROWS, i * LANES);
        store(c->dinitial_state, at + i * K, row, K, c->state_type);
    }
}

/* The gradient dy of what was prepared of a row of keys or queries, to that of the row itself. */
static void through_norm(const Call *c, const void *x, int64_t at, int64_t stride, float scale,
                         float *dy, void *dx, int64_t to)
{
    int64_t K = c->K, width = width_of(K);
    float row[MAX_K] = {0}, factor = scale, along = 0;
    if (c->use_qk_l2norm) {
        Vector products = {0};
        load(row, x, at, stride, K, c->token_type);
        for (int64_t j = 0; j < width; j += LANES) products += AT(row, j) * AT(dy, j);
        float r = 1 / norm(row, width);
        factor *= r;
        along = r * r * total(products);
    }
    for (int64_t j = 0; j < K; j++) dy[j] = factor * (dy[j] - row[j] * along);
    store(dx, to, dy, K, c->token_type);
}

static void run_head(const Call *c, const Room *w, const Sequence *s, int64_t n, int64_t h)
{
    int64_t R = c->HV / c->H, width = w->tokens.width;
    prepare(c, &w->tokens, s->b, h, s->start, s->length);
    memset(w->dkq, 0, s->length * 2 * width * sizeof(float));
    memset(w->dgates, 0, R * w->tokens.capacity * 2 * sizeof(float));
    for (int64_t r = 0; r < R; r++)
        for (int64_t i_v = 0; i_v < c->V; i_v += ROWS)
            walk_back(c, w, s, n, r, h * R + r, i_v);
    for (int64_t i = 0; i < s->length; i++) {
        int64_t t = s->start + i, to = ((s->b * c->T + t) * c->H + h) * c->K;
        float *dk = w->dkq + i * 2 * width;
        int64_t at_k = s->b * c->k_b + t * c->k_t + h * c->k_h;
        int64_t at_q = s->b * c->q_b + t * c->q_t + h * c->q_h;
        through_norm(c, c->k, at_k, c->k_k, 1, dk, c->dk, to);
        through_norm(c, c->q, at_q, c->q_k, c->scale, dk + width, c->dq, to);
        for (int64_t r = 0; r < R; r++) {
            const float *dgates = w->dgates + (r * w->tokens.capacity + i) * 2;
            int64_t place = (s->b * c->T + t) * c->HV + h * R + r;
            if (c->g) store(c->dg, place, dgates, 1, FLOAT32);
            if (c->beta) store(c->dbeta, place, dgates + 1, 1, c->beta_type);
        }
    }
}

/* Numbers of a thread's memory; with `base` its parts are placed. */
static int64_t place(const Call *c, float *base, Room *w)
{
    int64_t R = c->HV / c->H, T = c->T;
    w->tokens.capacity = T;
    w->tokens.width = width_of(c->K);
    w->block = ROWS * w->tokens.width;
    /* The states of an interval of 8 are in the first cache; of more tokens fewer are kept. */
    w->interval = 8;
    while (w->interval * 512 < T) w->interval *= 2;
    w->tokens.kq = base;
    w->tokens.gates = w->tokens.kq + T * 2 * w->tokens.width;
    w->tokens.decays = w->tokens.tiles = NULL;
    w->dkq = w->tokens.gates + R * T * 2;
    w->dgates = w->dkq + T * 2 * w->tokens.width;
    w->G = w->dgates + R * T * 2;
    w->states = w->G + w->block;
    w->kept = w->states + (w->interval + 1) * w->block;
    w->x = w->kept + (T / w->interval + 1) * w->block;
    return w->x + w->interval * ROWS - base;
}

static void run(const Call *c, const Sequence *sequences, float *memory, int64_t numbers)
{
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        Room w;
        place(c, memory + thread_number() * numbers, &w);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t h = 0; h < c->H; h++) run_head(c, &w, &sequences[n], n, h);
    }
}

int gdn_chunk_backward(const Call *c)
{
    Room of_thread;
    return run_call(c, place(c, NULL, &of_thread), run);
}
