/* Many tokens: tiles of a state whose lanes are its rows, which a thread keeps from the first token
   of a sequence to the last. No sum goes across lanes.

   A pass over a tile is two tokens, with one decay for all channels: with u and u' of them it is

       S <- d d' S + d' u k^T + u' k'^T

   and computes the products X of the new S with the keys and queries of the next two, from which

       u  = beta (v - d S k)                o  = d S q + u <k, q>
       u' = beta' (v' - d' (d S k' + u <k, k'>))
       o' = d' (d S q' + u <k, q'>) + u' <k', q'>

   That is 7 operations on an element for 8, and half of the loads and stores: a prefill takes 0.87
   (Intel Xeon, AVX-512 and AVX2, 2026-11-30). With a decay for each channel a pass is one token. */

#include "transpose.h"

/* A token of a tile [width, TILE]: of the new rows the product with the query, and with the next
   key, which saves a pass for S k. */
static void step_of_tile(float *tile, int64_t width, Token a, Token next, const Wide *u, Wide *S_k,
                         Wide *S_q)
{
    /* Sums over even and odd channels, as one would wait for itself. */
    Wide q[2][2] = {{{0}}}, k[2][2] = {{{0}}};
    for (int64_t j = 0; j < width; j += 2)
        for (int x = 0; x < 2; x++) {
            float *row = tile + (j + x) * TILE;
            float n_j = next.k[j + x] * next.decays[j + x];
            for (int y = 0; y < 2; y++) {
                Wide S = WIDE_AT(row, y * WIDE) * a.decays[j + x] + u[y] * a.k[j + x];
                WIDE_AT(row, y * WIDE) = S;
                q[x][y] += S * a.q[j + x];
                k[x][y] += S * n_j;
            }
        }
    for (int y = 0; y < 2; y++) {
        S_k[y] = k[0][y] + k[1][y];
        S_q[y] = q[0][y] + q[1][y];
    }
}

/* Two tokens of a tile, of which u has the first's already decayed. X are the products of the new
   rows with the keys and queries `next` of two tokens, [2, 2, width]. */
static void step_of_two(float *tile, int64_t width, float decay, const float *k, const float *next,
                        const Wide (*u)[2], Wide (*X)[2])
{
    Wide sums[4][2] = {{{0}}};
    for (int64_t j = 0; j < width; j++)
        for (int y = 0; y < 2; y++) {
            float *row = tile + j * TILE + y * WIDE;
            Wide S = WIDE_AT(row, 0) * decay + u[0][y] * k[j] + u[1][y] * k[2 * width + j];
            WIDE_AT(row, 0) = S;
            for (int x = 0; x < 4; x++) sums[x][y] += S * next[x * width + j];
        }
    memcpy(X, sums, sizeof(sums));
}

/* Of each two tokens <k, k'>, <k, q>, <k, q'>, <k', q'>; one more follows an odd number. */
static void prepare_pairs(const Call *c, const Scratch *w, int64_t count)
{
    int64_t width = w->width;
    pad(c, w, count, (count + 1) / 2 * 2);
    for (int64_t i = 0; i < count; i += 2) {
        const float *k = w->kq + i * 2 * width, *q = k + width, *k_2 = q + width;
        float *to = w->pairs + i * 2;
        to[0] = inner(k, k_2, width);
        to[1] = inner(k, q, width);
        to[2] = inner(k, k_2 + width, width);
        to[3] = inner(k_2, k_2 + width, width);
    }
}

/* Rows of a state from memory to their tile, and back. */
static void load_tile(const Call *c, const Sequence *s, int64_t hv, int64_t i_v, float *tile)
{
    Place rows = {first_row(c, s, hv, i_v), c->K, 1, c->K, least(c->V - i_v, TILE), c->state_type};
    load_turned(s->has_state ? c->initial_state : NULL, rows, (Rows){tile, TILE}, width_of(c->K),
                TILE);
}

static void store_tile(const Call *c, const Sequence *s, int64_t hv, int64_t i_v, float *tile)
{
    Place rows = {last_row(c, s, hv, i_v), c->K, 1, c->K, least(c->V - i_v, TILE), c->state_type};
    store_turned(c->state, rows, (Rows){tile, TILE}, width_of(c->K));
}

/* Values of a token, and those of one to come and where its output goes fetched. */
static inline void load_token(const Call *c, const Sequence *s, int64_t t, int64_t last, int64_t hv,
                              int64_t i_v, int64_t rows, float *v)
{
    int64_t ahead = t + AHEAD;
    load_values(c, s->b, t, hv, i_v, rows, TILE, v);
    if (ahead > last) return;
    fetch(c->v, s->b * c->v_b + ahead * c->v_t + hv * c->v_h + i_v * c->v_v, rows, c->token_type);
    fetch(c->o, ((s->b * c->T + ahead) * c->HV + hv) * c->V + i_v, rows, c->token_type);
}

/* A tile through `count` tokens that were prepared, of which the first is token t. */
static void walk_tile(const Call *c, const Scratch *w, const Sequence *s, int64_t t, int64_t count,
                      int64_t r, int64_t hv, int64_t i_v, float *tile)
{
    int64_t rows = least(c->V - i_v, TILE);
    float v[TILE] = {0}, o[TILE];
    Wide S_k[2] = {0}, S_q[2], u[2];
    Token a, next = token_of(c, w, 0, r);
    for (int64_t j = 0; j < c->K; j++)
        for (int y = 0; y < 2; y++)
            S_k[y] += WIDE_AT(tile, j * TILE + y * WIDE) * (next.k[j] * next.decays[j]);
    for (int64_t i = 0; i < count; i++) {
        a = next;
        /* After the last token its own key again, for nothing. */
        if (i + 1 < count) next = token_of(c, w, i + 1, r);
        load_token(c, s, t + i, t + count - 1, hv, i_v, rows, v);
        for (int y = 0; y < 2; y++) u[y] = (WIDE_AT(v, y * WIDE) - S_k[y]) * a.beta;
        step_of_tile(tile, w->width, a, next, u, S_k, S_q);
        memcpy(o, S_q, sizeof(o));
        store_values(c, c->o, s->b, t + i, hv, i_v, rows, TILE, o);
    }
}

/* The same, two tokens at a time. */
static void walk_tile_by_two(const Call *c, const Scratch *w, const Sequence *s, int64_t t,
                             int64_t count, int64_t r, int64_t hv, int64_t i_v, float *tile)
{
    int64_t width = w->width, rows = least(c->V - i_v, TILE);
    float v[2][TILE] = {{0}}, o[2][TILE];
    Wide X[4][2] = {{{0}}}, u[2][2];
    const float *k = w->kq;
    for (int64_t j = 0; j < width; j++)
        for (int y = 0; y < 2; y++)
            for (int x = 0; x < 4; x++)
                X[x][y] += WIDE_AT(tile, j * TILE + y * WIDE) * k[x * width + j];
    for (int64_t i = 0; i < count; i += 2, k += 4 * width) {
        const float *gates = w->gates + (r * w->capacity + i) * 2, *pairs = w->pairs + i * 2;
        float d = gates[0], d_2 = gates[2];
        int64_t tokens = least(count - i, 2);
        if (tokens == 1) memset(v[1], 0, sizeof(v[1]));
        for (int64_t x = 0; x < tokens; x++)
            load_token(c, s, t + i + x, t + count - 1, hv, i_v, rows, v[x]);
        for (int y = 0; y < 2; y++) {
            Wide first = (WIDE_AT(v[0], y * WIDE) - X[0][y] * d) * gates[1];
            Wide S_k = (X[2][y] * d + first * pairs[0]) * d_2;
            Wide second = (WIDE_AT(v[1], y * WIDE) - S_k) * gates[3];
            WIDE_AT(o[0], y * WIDE) = X[1][y] * d + first * pairs[1];
            WIDE_AT(o[1], y * WIDE) = (X[3][y] * d + first * pairs[2]) * d_2 + second * pairs[3];
            u[0][y] = first * d_2;
            u[1][y] = second;
        }
        /* After the last tokens their own keys and queries again, for nothing. */
        step_of_two(tile, width, d * d_2, k, i + 2 < count ? k + 4 * width : k, u, X);
        for (int64_t x = 0; x < tokens; x++)
            store_values(c, c->o, s->b, t + i + x, hv, i_v, rows, TILE, o[x]);
    }
}

/* Tiles `i_first` to `i_end - 1` of the value heads of a key head. */
static void walk_tiles(const Call *c, const Scratch *w, const Sequence *s, int64_t h,
                       int64_t i_first, int64_t i_end)
{
    int64_t of_head = tiles_of_head(c), R = c->HV / c->H;
    for (int64_t i = i_first; i < i_end; i++)
        load_tile(c, s, h * R + i / of_head, i % of_head * TILE, w->tiles + i * w->width * TILE);
    for (int64_t t = 0; t < s->length; t += w->capacity) {
        int64_t count = least(s->length - t, w->capacity);
        prepare(c, w, s->b, h, s->start + t, count, s->length - t);
        if (!c->by_channel) prepare_pairs(c, w, count);
        for (int64_t i = i_first; i < i_end; i++) {
            int64_t r = i / of_head, i_v = i % of_head * TILE;
            float *tile = w->tiles + i * w->width * TILE;
            if (c->by_channel)
                walk_tile(c, w, s, s->start + t, count, r, h * R + r, i_v, tile);
            else
                walk_tile_by_two(c, w, s, s->start + t, count, r, h * R + r, i_v, tile);
        }
    }
    for (int64_t i = i_first; i < i_end; i++)
        store_tile(c, s, h * R + i / of_head, i % of_head * TILE, w->tiles + i * w->width * TILE);
}
