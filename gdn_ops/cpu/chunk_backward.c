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

   A task is a sequence and key head. A walk has at most PANEL rows of the state of one of its value
   heads, forwards, where it keeps the states before the chunks, and back. The first walk prepares
   keys and queries, the last has the gradients of all. A state is [K, rows], so that its rows are
   lanes. chunk_backward.py makes its `Call`; the arithmetic is float32. */

#include "recurrent_call.h"

#include "chunk_steps.h"

/* What a task has. */
typedef struct {
    Scratch tokens;
    float *kq_T, *pairs, *dkq_T, *dpairs; /* of all chunks */
    float *dgates;                        /* [R, capacity, 2] */
    float *states, *G, *x; /* of a walk: [chunks, width, P], [width, P], [capacity, P] */
} Room;

/* Rows `i_v` to `i_v + rows - 1` of value head hv, the r-th of its key head, in P lanes. */
typedef struct {
    int64_t r, hv, i_v, rows, P;
} Walk;

static int64_t chunks_of(int64_t tokens)
{
    return (tokens + CHUNK - 1) / CHUNK;
}

static int64_t walks_of_head(const Call *c)
{
    return (c->V + PANEL - 1) / PANEL;
}

static Walk walk_of(const Call *c, int64_t h, int64_t i)
{
    int64_t r = i / walks_of_head(c), i_v = i % walks_of_head(c) * PANEL;
    int64_t rows = least(c->V - i_v, PANEL);
    return (Walk){r, h * (c->HV / c->H) + r, i_v, rows, whole(rows)};
}

static Chunk chunk_of(const Room *w, int64_t i)
{
    int64_t numbers = i * CHUNK * 2 * w->tokens.width, pairs = i * 2 * PAIRS;
    return (Chunk){w->tokens.kq + numbers, w->kq_T + numbers, w->pairs + pairs,
                   w->dkq_T + numbers, w->dpairs + pairs};
}

/* Rows of v or of do, `[B, T, HV, V]`, of a chunk: each `stride` after the one before. */
INLINE void load_panel(const Call *c, float *to, int64_t stride, const void *from, int64_t at,
                       int64_t of_token, int64_t of_row, int64_t count, int64_t rows,
                       const int64_t P)
{
    for (int64_t i = 0; i < CHUNK; i++, to += stride, at += of_token) {
        if (i >= count || rows < P) memset(to, 0, P * sizeof(float));
        if (i < count) load_rows(to, from, at, of_row, rows, P, c->token_type);
    }
}

/* Rows of a chunk that is walked next, or that are written, fetched. */
static void fetch_panel(const void *p, int64_t at, int64_t of_token, int64_t count, int64_t rows,
                        int type)
{
    for (int64_t i = 0; i < count; i++) fetch(p, at + i * of_token, rows, type);
}

/* Keys and queries of a chunk, by channel too, and their products with its keys. */
static void prepare_chunk(const Call *c, const Room *w, const Sequence *s, int64_t h, int64_t i)
{
    int64_t width = w->tokens.width, t = i * CHUNK, count = least(s->length - t, CHUNK);
    Scratch tokens = w->tokens;
    Chunk chunk = chunk_of(w, i);
    tokens.kq = chunk.kq;
    tokens.gates += 2 * t;
    tokens.inverse_norms += 2 * t;
    prepare(c, &tokens, s->b, h, s->start + t, count, s->length - t);
    pad(c, &tokens, count, CHUNK);
    for (int x = 0; x < 2; x++) {
        Rows from = {chunk.kq + x * width, 2 * width};
        transpose((Rows){chunk.kq_T + x * CHUNK, 2 * CHUNK}, from, CHUNK, width);
        product((Rows){chunk.pairs + x * PAIRS, CHUNK}, 0, (Rows){0}, (Left){from.p, from.row, 1},
                (Rows){chunk.kq_T, 2 * CHUNK}, CHUNK, CHUNK, width);
    }
    for (int x = 0; x < CHUNK; x++) chunk.pairs[x * CHUNK + x] = 0;
}

/* A walk forwards through a chunk: x, and the state after it. */
INLINE void advance(const Call *c, const Room *w, const Sequence *s, const Walk *a, int64_t i,
                    const int64_t width, const int64_t P)
{
    ALIGNED float u[CHUNK * PANEL];
    Gates of;
    Chunk chunk = chunk_of(w, i);
    int64_t t = i * CHUNK, count = least(s->length - t, CHUNK), next = s->length - t - CHUNK;
    int64_t at = s->b * c->v_b + (s->start + t) * c->v_t + a->hv * c->v_h + a->i_v * c->v_v;
    float *S = w->states + i * width * P, *x = w->x + t * P;
    find_gates(w->tokens.gates + (a->r * w->tokens.capacity + t) * 2, chunk.pairs, &of);
    load_panel(c, x, P, c->v, at, c->v_t, c->v_v, count, a->rows, P);
    fetch_panel(c->v, at + CHUNK * c->v_t, c->v_t, least(next, CHUNK), a->rows, c->token_type);
    solve(&chunk, &of, S, x, u, width, P);
    if (next > 0)
        product((Rows){S + width * P, P}, of.from_start[CHUNK - 1], (Rows){S, P},
                (Left){chunk.kq, 1, 2 * width}, (Rows){u, P}, width, P, CHUNK);
}

/* A walk back through a chunk. */
INLINE void come_back(const Call *c, const Room *w, const Sequence *s, const Walk *a, int64_t i,
                      const int64_t width, const int64_t P)
{
    ALIGNED float rows[2 * CHUNK * PANEL];
    Gates of;
    Chunk chunk = chunk_of(w, i);
    int64_t t = i * CHUNK, count = least(s->length - t, CHUNK);
    int64_t at = s->b * c->do_b + (s->start + t) * c->do_t + a->hv * c->do_h + a->i_v * c->do_v;
    int64_t at_v = ((s->b * c->T + s->start + t) * c->HV + a->hv) * c->V + a->i_v;
    int64_t place = (a->r * w->tokens.capacity + t) * 2;
    find_gates(w->tokens.gates + place, chunk.pairs, &of);
    load_panel(c, rows + P, 2 * P, c->d_o, at, c->do_t, c->do_v, count, a->rows, P);
    fetch_panel(c->d_o, at - CHUNK * c->do_t, c->do_t, i ? CHUNK : 0, a->rows, c->token_type);
    fetch_panel(c->dv, at_v, c->HV * c->V, count, a->rows, c->token_type);
    retreat(&chunk, &of, w->states + i * width * P, w->G, w->x + t * P, rows, w->dgates + place,
            width, P);
    for (int64_t x = 0; x < count; x++)
        store_rows(c->dv, at_v + x * c->HV * c->V, rows + 2 * x * P, a->rows, P, c->token_type);
}

INLINE void pass(const Call *c, const Room *w, const Sequence *s, const Walk *a, int64_t i,
                 int is_back, const int64_t width, const int64_t P)
{
    if (is_back) come_back(c, w, s, a, i, width, P);
    else advance(c, w, s, a, i, width, P);
}

/* Either, with sizes that the compiler knows: those of models, and small ones. Gradients of
   (1, 256, 16, 32, 128, 128) take 0.93, of (8, 512, 2, 4, 32, 32) 0.95 (Intel Xeon, 2026-11-30). */
static void pass_chunk(const Call *c, const Room *w, const Sequence *s, const Walk *a, int64_t i,
                       int is_back)
{
    int64_t width = w->tokens.width;
    if (width == 128 && a->P == 64) pass(c, w, s, a, i, is_back, 128, 64);
    else if (width == 32 && a->P == 32) pass(c, w, s, a, i, is_back, 32, 32);
    else pass(c, w, s, a, i, is_back, width, a->P);
}

/* The gradient dy of a prepared key or query y = scale x / |x|, to that of x. */
static inline void through_norm(const Call *c, const float *y, float inverse_norm, float scale,
                                float *dy, void *dx, int64_t to, int64_t width)
{
    float along = 0;
    if (c->use_qk_l2norm && scale != 0) along = inner(y, dy, width) / (scale * scale);
    for (int64_t j = 0; j < width; j += LANES)
        AT(dy, j) = (AT(dy, j) - AT(y, j) * along) * (inverse_norm * scale);
    store(dx, to, dy, c->K, c->token_type);
}

/* The gradients of the keys and queries of a chunk that were prepared, [CHUNK, 2, width]. */
static void through_pairs(const Chunk *w, float *dkq, int64_t width)
{
    int64_t row = 2 * width;
    ALIGNED float both[PAIRS];
    float *dKK = w->dpairs, *dQK = dKK + PAIRS;
    Rows k = {w->kq, row}, q = {w->kq + width, row}, dk = {dkq, row}, dq = {dkq + width, row};
    transpose(dk, (Rows){w->dkq_T, 2 * CHUNK}, width, CHUNK);
    transpose(dq, (Rows){w->dkq_T + CHUNK, 2 * CHUNK}, width, CHUNK);
    product(dq, 1, dq, (Left){dQK, CHUNK, 1}, k, CHUNK, width, CHUNK);
    product(dk, 1, dk, (Left){dQK, 1, CHUNK}, q, CHUNK, width, CHUNK);
    for (int i = 0; i < CHUNK; i++) dKK[i * CHUNK + i] = 0;
    transpose((Rows){both, CHUNK}, (Rows){dKK, CHUNK}, CHUNK, CHUNK);
    for (int i = 0; i < PAIRS; i += WIDE) WIDE_AT(both, i) += WIDE_AT(dKK, i);
    product(dk, 1, dk, (Left){both, 1, CHUNK}, k, CHUNK, width, CHUNK);
}

/* The gradients of keys, queries and gates of a chunk that all walks have come back through. */
static void finish_chunk(const Call *c, const Room *w, const Sequence *s, int64_t h, int64_t i)
{
    int64_t R = c->HV / c->H, width = w->tokens.width, count = least(s->length - i * CHUNK, CHUNK);
    ALIGNED float dkq[CHUNK * 2 * MAX_K];
    int64_t at = ((s->b * c->T + s->start + i * CHUNK) * c->H + h) * c->K, of_token = c->H * c->K;
    int64_t before = at - CHUNK * of_token, fetched = i ? CHUNK : 0;
    Chunk chunk = chunk_of(w, i);
    fetch_panel(c->dk, before, of_token, fetched, c->K, c->token_type);
    fetch_panel(c->dq, before, of_token, fetched, c->K, c->token_type);
    through_pairs(&chunk, dkq, width);
    for (int64_t x = 0; x < count; x++) {
        int64_t token = i * CHUNK + x, to = at + x * of_token;
        float *dk = dkq + x * 2 * width;
        const float *k = chunk.kq + x * 2 * width, *inverse = w->tokens.inverse_norms + 2 * token;
        through_norm(c, k, inverse[0], 1, dk, c->dk, to, width);
        through_norm(c, k + width, inverse[1], c->scale, dk + width, c->dq, to, width);
        for (int64_t r = 0; r < R; r++) {
            const float *dgates = w->dgates + (r * w->tokens.capacity + token) * 2;
            int64_t of_head = (s->b * c->T + s->start + token) * c->HV + h * R + r;
            if (c->g) store(c->dg, of_head, dgates, 1, FLOAT32);
            if (c->beta) store(c->dbeta, of_head, dgates + 1, 1, c->beta_type);
        }
    }
}

/* Walk i of sequence n and key head h, of which `is_last` is the last. */
static void walk(const Call *c, const Room *w, const Sequence *s, int64_t n, int64_t h, int64_t i,
                 int is_last)
{
    int64_t width = w->tokens.width, chunks = chunks_of(s->length), K = c->K;
    Walk a = walk_of(c, h, i);
    Place first = {first_row(c, s, a.hv, a.i_v), K, 1, K, a.rows, c->state_type};
    Place last = {n * c->dfinal_n + a.hv * c->dfinal_h + a.i_v * c->dfinal_v,
                  c->dfinal_v, c->dfinal_k, K, a.rows, c->state_type};
    Place of_first = {((n * c->HV + a.hv) * c->V + a.i_v) * K, K, 1, K, a.rows, c->state_type};
    load_turned(s->has_state ? c->initial_state : NULL, first, (Rows){w->states, a.P}, width, a.P);
    load_turned(c->dfinal_state, last, (Rows){w->G, a.P}, width, a.P);
    for (int64_t x = 0; x < chunks; x++) {
        if (i == 0) prepare_chunk(c, w, s, h, x);
        pass_chunk(c, w, s, &a, x, 0);
    }
    for (int64_t x = chunks - 1; x >= 0; x--) {
        pass_chunk(c, w, s, &a, x, 1);
        if (is_last) finish_chunk(c, w, s, h, x);
    }
    if (c->dinitial_state) store_turned(c->dinitial_state, of_first, (Rows){w->G, a.P}, width);
}

static void run_head(const Call *c, const Room *w, const Sequence *s, int64_t n, int64_t h)
{
    int64_t R = c->HV / c->H, tokens = chunks_of(s->length) * CHUNK, walks = R * walks_of_head(c);
    memset(w->dkq_T, 0, tokens * 2 * w->tokens.width * sizeof(float));
    memset(w->dpairs, 0, tokens * 2 * CHUNK * sizeof(float));
    memset(w->dgates, 0, R * w->tokens.capacity * 2 * sizeof(float));
    for (int64_t i = 0; i < walks; i++) walk(c, w, s, n, h, i, i == walks - 1);
}

/* Numbers of a thread's memory; with `base` its parts are placed. */
static int64_t place(const Call *c, float *base, Room *w)
{
    int64_t R = c->HV / c->H, tokens = chunks_of(c->T) * CHUNK, of_gates = R * tokens * 2;
    int64_t width = whole(c->K), P = whole(least(c->V, PANEL));
    w->tokens.capacity = tokens;
    w->tokens.width = width;
    w->tokens.kq = base;
    w->tokens.gates = w->tokens.kq + tokens * 2 * width;
    w->tokens.decays = w->tokens.tiles = w->tokens.pairs = NULL;
    w->tokens.inverse_norms = w->tokens.gates + of_gates;
    w->kq_T = w->tokens.inverse_norms + tokens * 2;
    w->pairs = w->kq_T + tokens * 2 * width;
    w->dkq_T = w->pairs + tokens * 2 * CHUNK;
    w->dpairs = w->dkq_T + tokens * 2 * width;
    w->dgates = w->dpairs + tokens * 2 * CHUNK;
    w->states = w->dgates + of_gates;
    w->G = w->states + tokens / CHUNK * width * P;
    w->x = w->G + width * P;
    return w->x + tokens * P - base;
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
