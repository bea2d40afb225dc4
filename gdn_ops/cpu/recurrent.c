/* Gated delta rule, token by token, on a CPU: recurrent, chunk and their forms on a pool.

       S <- exp(g) S + u k^T     u = beta (v - exp(g) S k)     o = scale S q

   Built where it is first called (build.py); recurrent.py and call.py make its `Call`. A task is a
   sequence, a key head and some of the rows of its value heads' states. Keys and queries are made
   float32, normalised and scaled; the arithmetic is float32.

   For few tokens a state moves through memory once in each direction: ROWS rows are read for S k,
   and again, from the first cache, for all else. A float32 state is updated where it stays, others
   are widened into a buffer. `recurrent` computes all tokens so, with the same bits wherever a
   sequence is cut. `chunk` walks tiles (recurrent_tile.h), which is faster for many tokens. Both
   need fewer operations than matrix products of chunks, 6 K V of a token and head where chunks of
   32 tokens have 1.2 times as many, and no pass over anything else. */

#include "recurrent_call.h"
#include "recurrent_tile.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Tokens from which on a state is turned into tiles and back; tokens that are prepared at once. */
enum { TILE_TOKENS = 16, SEGMENT = 64 };

/* A token: ROWS rows of K numbers from `from` to `to`, which may be the same; o is S q. The rows
   after these are fetched. */
INLINE void step(const float *from, float *to, int64_t K, Token a, int by_channel, const float *v,
                 float *o)
{
    Vector sums[ROWS] = {0};
    float u[ROWS];
    for (int64_t j = 0; j < K; j += LANES) {
        Vector k_j = AT(a.k, j);
        if (by_channel) k_j *= AT(a.decays, j);
        for (int r = 0; r < ROWS; r++) sums[r] += AT(from + r * K, j) * k_j;
    }
    AT(u, 0) = (AT(v, 0) - totals(sums) * a.decay) * a.beta;
    for (int r = 0; r < ROWS; r++) sums[r] = (Vector){0};
    for (int64_t j = 0; j < K; j += LANES) {
        Vector k_j = AT(a.k, j), q_j = AT(a.q, j), d_j = a.decay - (Vector){0};
        if (by_channel) d_j = AT(a.decays, j);
        for (int r = 0; r < ROWS; r++) {
            Vector S = AT(from + r * K, j) * d_j + u[r] * k_j;
            AT(to + r * K, j) = S;
            sums[r] += S * q_j;
            if (j % 16 == 0) __builtin_prefetch(from + (r + ROWS) * K + j);
            if (j % 16 == 0 && to != from) __builtin_prefetch(to + (r + ROWS) * K + j, 1);
        }
    }
    AT(o, 0) = totals(sums);
}

/* Rows `i_v` to `i_v + ROWS - 1` of a state, through all tokens of sequence n. */
static void walk_rows(const Call *c, const Scratch *w, const Sequence *s, int64_t n, int64_t r,
                      int64_t hv, int64_t i_v)
{
    int64_t K = c->K, width = w->width, rows = least(c->V - i_v, ROWS);
    int64_t first = first_row(c, s, hv, i_v), last = last_row(c, s, hv, i_v);
    float buffer[ROWS * MAX_K], v[ROWS] = {0}, o[ROWS];
    int is_direct = c->state_type == FLOAT32 && !c->columns && rows == ROWS && K == width;
    is_direct = is_direct && s->has_state && s->length > 0;
    const float *from = is_direct ? (const float *)c->initial_state + first : buffer;
    float *to = is_direct ? (float *)c->state + last : buffer;
    if (!is_direct) memset(buffer, 0, ROWS * width * sizeof(float));
    for (int64_t i = 0; !is_direct && s->has_state && i < rows; i++)
        load(buffer + i * width, c->initial_state, first + i * K, 1, K, c->state_type);
    for (int64_t i = 0; i < s->length; i++, from = to) {
        int64_t t = s->start + i, slot = -1;
        Token a = token_of(c, w, i, r);
        load_values(c, s->b, t, hv, i_v, rows, ROWS, v);
        if (c->by_channel)
            step(from, to, width, a, 1, v, o);
        else
            step(from, to, width, a, 0, v, o);
        store_values(c, c->o, s->b, t, hv, i_v, rows, ROWS, o);
        if (c->columns)
            slot = integer(c->state_indices, n * c->indices_n + i * c->indices_s, c->wide_indices);
        for (int64_t x = 0; slot > c->null_index && x < rows; x++) {
            int64_t row = slot * c->state_n + hv * c->state_h + (i_v + x) * K;
            store(c->state, row, buffer + x * width, K, c->state_type);
        }
    }
    for (int64_t i = 0; !is_direct && !c->columns && i < rows; i++)
        store(c->state, last + i * K, buffer + i * width, K, c->state_type);
}

static void run_task(const Call *c, const Scratch *w, const Sequence *s, int64_t n, int64_t h,
                     int64_t i_first, int64_t i_end)
{
    if (c->has_tiles && s->length >= TILE_TOKENS) {
        walk_tiles(c, w, s, h, i_first, i_end);
        return;
    }
    int64_t of_head = tiles_of_head(c), R = c->HV / c->H;
    prepare(c, w, s->b, h, s->start, s->length, s->length);
    for (int64_t i = i_first; i < i_end; i++) {
        int64_t r = i / of_head, i_v = i % of_head * TILE, end = i_v + TILE;
        for (; i_v < end && i_v < c->V; i_v += ROWS) walk_rows(c, w, s, n, r, h * R + r, i_v);
    }
}

/* Numbers of a thread's memory; with `base` its parts are placed. */
static int64_t place(const Call *c, float *base, Scratch *w)
{
    int64_t R = c->HV / c->H, tiles = R * tiles_of_head(c);
    w->capacity = c->has_tiles ? SEGMENT : c->T;
    w->width = width_of(c->K);
    w->inverse_norms = NULL;
    w->kq = base;
    w->gates = w->kq + whole(w->capacity * 2 * w->width);
    w->decays = w->gates + whole(R * w->capacity * 2);
    w->pairs = w->decays + (c->by_channel ? whole(R * w->capacity * w->width) : 0);
    w->tiles = w->pairs + (c->has_tiles ? whole(w->capacity * 2) : 0);
    return w->tiles + (c->has_tiles ? tiles * w->width * TILE : 0) - base;
}

/* New states in pages of 2 MiB: the system hands out fresh memory a page at a time, and with pages
   of 4 KiB that is most of a step (64 MiB: 12 ms to fill, 2.7 so; AMD EPYC, 2026-11-30). */
static void ask_for_large_pages(const Call *c)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20;
    int64_t bytes = c->N * c->state_n * (c->state_type == FLOAT32 ? 4 : 2);
    uintptr_t first = ((uintptr_t)c->state + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)c->state + bytes) / page * page;
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)c;
#endif
}

static void run(const Call *c, const Sequence *sequences, float *memory, int64_t numbers)
{
    int64_t tiles = c->HV / c->H * tiles_of_head(c), heads = c->N * c->H;
    /* Where there are fewer heads than threads, some share one, and each prepares its tokens. */
    int64_t parts = least((c->threads + heads - 1) / heads, tiles);
    if (c->is_functional) ask_for_large_pages(c);
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
        Scratch w;
        Mode mode = flush_subnormal();
        place(c, memory + thread_number() * numbers, &w);
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t h = 0; h < c->H; h++)
                for (int64_t i = 0; i < parts; i++)
                    if (sequences[n].is_live)
                        run_task(c, &w, &sequences[n], n, h, i * tiles / parts,
                                 (i + 1) * tiles / parts);
        set_mode(mode);
    }
}

int gdn_recurrent(const Call *c)
{
    Scratch of_thread;
    return run_call(c, place(c, NULL, &of_thread), run);
}
