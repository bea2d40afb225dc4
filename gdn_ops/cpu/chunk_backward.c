/* The gradient of the gated delta rule on a CPU, in chunks: of chunk and of recurrent.

   Of a chunk with S and S' the states before and after it, G the gradient of S', D_ij the decay
   from token j to token i (zero for j > i), d_i that from before the chunk to token i, t_i that
   from token i to its end,

       x_i = v_i - d_i S k_i - sum over j < i of D_ij <k_i, k_j> u_j          u_i = beta_i x_i
       S'  = d S + sum of t_i u_i k_i^T
       y_j = t_j G k_j + sum over i of D_ij <q_i, k_j> do_i - sum over i > j of D_ij <k_i, k_j> e_i
       e_j = beta_j y_j = dv_j          dbeta_j = <y_j, x_j>
       G  <- d G + sum of d_i do_i q_i^T - d_i e_i k_i^T
       dq_i  = d_i S^T do_i + sum over j of D_ij <do_i, u_j> k_j
       dk_i  = t_i G^T u_i - d_i S^T e_i + what <q, k> and <k, k> pass on

   and the gradient of a log decay is the sum, over all terms that it is in, of term and gradient.
   All but the two triangular solves are matrix products, of CHUNK tokens (chunk_steps.h).

   A task is a sequence and key head. It walks at most PANEL rows of a state at a time, forwards,
   and keeps the states before the chunks; then backwards. A state is [K, rows], so that its rows
   are lanes. chunk_backward.py makes its `Call`; the arithmetic is float32. */

#include "recurrent_call.h"

#include "chunk_steps.h"

/* Rows of v or of do, `[B, T, HV, V]`, of a chunk: each `stride` after the one before. */
static void load_panel(const Call *c, float *to, int64_t stride, const void *from, int64_t at,
                       int64_t of_token, int64_t of_row, int64_t count, int64_t rows, int64_t panel)
{
    for (int64_t i = 0; i < CHUNK; i++) {
        if (i >= count || rows < panel) memset(to + i * stride, 0, panel * sizeof(float));
        if (i < count) load(to + i * stride, from, at + i * of_token, of_row, rows, c->token_type);
    }
}

/* Rows of a chunk that is walked next, or that are written, fetched. */
static void fetch_panel(const void *p, int64_t at, int64_t of_token, int64_t count, int64_t rows,
                        int type, const int is_written)
{
    for (int64_t i = 0; i < count; i++) fetch(p, at + i * of_token, rows, type, is_written);
}

/* Rows `i_v` to `i_v + rows - 1` of a state, forwards and back. */
static void walk_back(const Call *c, const Room *w, const Sequence *s, int64_t n, int64_t r,
                      int64_t hv, int64_t i_v, int64_t rows)
{
    int64_t K = c->K, width = w->tokens.width, P = w->panel, chunks = chunks_of(s->length);
    ALIGNED float panel[2 * CHUNK * PANEL], u[CHUNK * PANEL];
    Gates of;
    Place first = {first_row(c, s, hv, i_v), K, 1, K, rows, c->state_type};
    Place last = {n * c->dfinal_n + hv * c->dfinal_h + i_v * c->dfinal_v,
                  c->dfinal_v, c->dfinal_k, K, rows, c->state_type};
    load_turned(s->has_state ? c->initial_state : NULL, first, (Rows){w->states, P}, width, P);
    load_turned(c->dfinal_state, last, (Rows){w->G, P}, width, P);
    for (int64_t i = 0; i < chunks; i++) {
        int64_t t = s->start + i * CHUNK, count = least(s->length - i * CHUNK, CHUNK);
        int64_t at = s->b * c->v_b + t * c->v_t + hv * c->v_h + i_v * c->v_v;
        float *S = w->states + i * width * P, *x = w->x + i * CHUNK * P;
        const float *k = w->tokens.kq + i * CHUNK * 2 * width;
        find_gates(w, i, r, &of);
        load_panel(c, x, P, c->v, at, c->v_t, c->v_v, count, rows, P);
        fetch_panel(c->v, at + CHUNK * c->v_t, c->v_t, least(s->length - (i + 1) * CHUNK, CHUNK),
                    rows, c->token_type, 0);
        solve(w, &of, w->kq_by_channel + i * CHUNK * 2 * width, S, x, u);
        if (i + 1 < chunks)
            product((Rows){S + width * P, P}, of.from_start[CHUNK - 1], (Rows){S, P},
                    (Left){k, 1, 2 * width}, (Rows){u, P}, width, P, CHUNK);
    }
    for (int64_t i = chunks - 1; i >= 0; i--) {
        int64_t t = s->start + i * CHUNK, count = least(s->length - i * CHUNK, CHUNK);
        int64_t at = s->b * c->do_b + t * c->do_t + hv * c->do_h + i_v * c->do_v;
        find_gates(w, i, r, &of);
        int64_t at_v = ((s->b * c->T + t) * c->HV + hv) * c->V + i_v;
        load_panel(c, panel + P, 2 * P, c->d_o, at, c->do_t, c->do_v, count, rows, P);
        fetch_panel(c->d_o, at - CHUNK * c->do_t, c->do_t, i ? CHUNK : 0, rows, c->token_type, 0);
        fetch_panel(c->dv, at_v, c->HV * c->V, count, rows, c->token_type, 1);
        retreat(w, &of, i, w->x + i * CHUNK * P, panel,
                w->dgates + (r * w->tokens.capacity + i * CHUNK) * 2);
        for (int64_t x = 0; x < count; x++)
            store(c->dv, at_v + x * c->HV * c->V, panel + 2 * x * P, rows, c->token_type);
    }
    Place of_first = {((n * c->HV + hv) * c->V + i_v) * K, K, 1, K, rows, c->state_type};
    if (c->dinitial_state) store_turned(c->dinitial_state, of_first, (Rows){w->G, P}, width);
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

/* Keys and queries of a sequence by channel, and their products with the keys of their chunk. */
static void prepare_chunks(const Call *c, const Room *w, const Sequence *s, int64_t h)
{
    int64_t R = c->HV / c->H, width = w->tokens.width, tokens = chunks_of(s->length) * CHUNK;
    prepare(c, &w->tokens, s->b, h, s->start, s->length);
    memset(w->tokens.kq + s->length * 2 * width, 0,
           (tokens - s->length) * 2 * width * sizeof(float));
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = s->length; i < tokens; i++)
            for (int x = 0; x < 2; x++) w->tokens.gates[(r * w->tokens.capacity + i) * 2 + x] = 1;
    for (int64_t i = 0; i < tokens / CHUNK; i++) {
        float *kq = w->tokens.kq + i * CHUNK * 2 * width;
        float *by_channel = w->kq_by_channel + i * CHUNK * 2 * width;
        for (int x = 0; x < 2; x++) {
            float *pairs = w->pairs + (2 * i + x) * PAIRS;
            transpose((Rows){by_channel + x * CHUNK, 2 * CHUNK},
                      (Rows){kq + x * width, 2 * width}, CHUNK, width);
            product((Rows){pairs, CHUNK}, 0, (Rows){0}, (Left){kq + x * width, 2 * width, 1},
                    (Rows){by_channel, 2 * CHUNK}, CHUNK, CHUNK, width);
        }
    }
}

/* The gradients of the keys and queries of a chunk that were prepared, [CHUNK, 2, width]. */
static void finish_chunk(const Room *w, int64_t chunk, float *dkq)
{
    int64_t width = w->tokens.width, row = 2 * width;
    float *kq = w->tokens.kq + chunk * CHUNK * row;
    float *by_channel = w->dkq + chunk * CHUNK * row;
    float *dKK = dpairs_of(w, chunk), *dQK = dKK + PAIRS;
    Rows k = {kq, row}, q = {kq + width, row}, dk = {dkq, row}, dq = {dkq + width, row};
    for (int i = 0; i < CHUNK; i++) dKK[i * CHUNK + i] = 0;
    transpose(dk, (Rows){by_channel, 2 * CHUNK}, width, CHUNK);
    transpose(dq, (Rows){by_channel + CHUNK, 2 * CHUNK}, width, CHUNK);
    product(dq, 1, dq, (Left){dQK, CHUNK, 1}, k, CHUNK, width, CHUNK);
    product(dk, 1, dk, (Left){dQK, 1, CHUNK}, q, CHUNK, width, CHUNK);
    product(dk, 1, dk, (Left){dKK, CHUNK, 1}, k, CHUNK, width, CHUNK);
    product(dk, 1, dk, (Left){dKK, 1, CHUNK}, k, CHUNK, width, CHUNK);
}

static void run_head(const Call *c, const Room *room, const Sequence *s, int64_t n, int64_t h)
{
    int64_t R = c->HV / c->H, width = room->tokens.width, chunks = chunks_of(s->length);
    ALIGNED float dkq[CHUNK * 2 * MAX_K];
    Room w = *room;
    prepare_chunks(c, &w, s, h);
    memset(w.dkq, 0, chunks * CHUNK * 2 * width * sizeof(float));
    memset(w.dpairs, 0, chunks * 2 * PAIRS * sizeof(float));
    memset(w.dgates, 0, R * w.tokens.capacity * 2 * sizeof(float));
    for (int64_t r = 0; r < R; r++)
        for (int64_t i_v = 0; i_v < c->V; i_v += PANEL) {
            int64_t rows = least(c->V - i_v, PANEL);
            w.panel = whole(rows);
            walk_back(c, &w, s, n, r, h * R + r, i_v, rows);
        }
    for (int64_t i = 0; i < s->length; i++) {
        int64_t t = s->start + i, to = ((s->b * c->T + t) * c->H + h) * c->K;
        float *dk = dkq + i % CHUNK * 2 * width;
        int64_t at_k = s->b * c->k_b + t * c->k_t + h * c->k_h;
        int64_t at_q = s->b * c->q_b + t * c->q_t + h * c->q_h;
        if (i % CHUNK == 0) finish_chunk(&w, i / CHUNK, dkq);
        if (i + AHEAD < s->length) {
            int64_t of_token = AHEAD * c->H * c->K;
            fetch(c->k, at_k + AHEAD * c->k_t, c->K, c->token_type, 0);
            fetch(c->q, at_q + AHEAD * c->q_t, c->K, c->token_type, 0);
            fetch(c->dk, to + of_token, c->K, c->token_type, 1);
            fetch(c->dq, to + of_token, c->K, c->token_type, 1);
        }
        through_norm(c, c->k, at_k, c->k_k, 1, dk, c->dk, to);
        through_norm(c, c->q, at_q, c->q_k, c->scale, dk + width, c->dq, to);
        for (int64_t r = 0; r < R; r++) {
            const float *dgates = w.dgates + (r * w.tokens.capacity + i) * 2;
            int64_t place = (s->b * c->T + t) * c->HV + h * R + r;
            if (c->g) store(c->dg, place, dgates, 1, FLOAT32);
            if (c->beta) store(c->dbeta, place, dgates + 1, 1, c->beta_type);
        }
    }
}

/* Numbers of a thread's memory; with `base` its parts are placed. */
static int64_t place(const Call *c, float *base, Room *w)
{
    int64_t R = c->HV / c->H, chunks = chunks_of(c->T), tokens = chunks * CHUNK;
    int64_t width = whole(c->K), panel = whole(least(c->V, PANEL));
    w->tokens.capacity = tokens;
    w->tokens.width = width;
    w->tokens.kq = base;
    w->tokens.gates = w->tokens.kq + tokens * 2 * width;
    w->tokens.decays = w->tokens.tiles = NULL;
    w->kq_by_channel = w->tokens.gates + whole(R * tokens * 2);
    w->dkq = w->kq_by_channel + tokens * 2 * width;
    w->pairs = w->dkq + tokens * 2 * width;
    w->dpairs = w->pairs + chunks * 2 * PAIRS;
    w->dgates = w->dpairs + chunks * 2 * PAIRS;
    w->states = w->dgates + whole(R * tokens * 2);
    w->G = w->states + chunks * width * panel;
    w->x = w->G + width * panel;
    return w->x + tokens * panel - base;
}

static void run(const Call *c, const Sequence *sequences, float *memory, int64_t numbers)
{
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        Room w;
        Mode mode = flush_subnormal();
        place(c, memory + thread_number() * numbers, &w);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t h = 0; h < c->H; h++) run_head(c, &w, &sequences[n], n, h);
        set_mode(mode);
    }
}

int gdn_chunk_backward(const Call *c)
{
    Room of_thread;
    return run_call(c, place(c, NULL, &of_thread), run);
}
