/* Many tokens: tiles of a state whose lanes are its rows, which a thread keeps from the first token
   of a sequence to the last. No sum goes across lanes. */

#include "transpose.h"

/* A token of a tile [width, TILE]: of the new rows the product with the query, and with the next
   key, which saves a pass for S k. */
INLINE void step_of_tile(float *tile, int64_t width, Token a, Token next, int by_channel,
                         const Wide *u, Wide *S_k, Wide *S_q)
{
    /* Sums over even and odd channels, as one would wait for itself. */
    Wide q[2][2] = {{{0}}}, k[2][2] = {{{0}}};
    for (int64_t j = 0; j < width; j += 2)
        for (int x = 0; x < 2; x++) {
            float *row = tile + (j + x) * TILE;
            float d_j = by_channel ? a.decays[j + x] : a.decay, n_j = next.k[j + x];
            if (by_channel) n_j *= next.decays[j + x];
            for (int y = 0; y < 2; y++) {
                Wide S = WIDE_AT(row, y * WIDE) * d_j + u[y] * a.k[j + x];
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

/* A tile through `count` tokens that were prepared, of which the first is token t. */
static void walk_tile(const Call *c, const Scratch *w, const Sequence *s, int64_t t, int64_t count,
                      int64_t r, int64_t hv, int64_t i_v, float *tile)
{
    int64_t K = c->K, rows = least(c->V - i_v, TILE);
    float v[TILE] = {0}, o[TILE];
    Wide S_k[2] = {0}, S_q[2], u[2];
    Token a, next = token_of(c, w, 0, r);
    for (int64_t j = 0; j < K; j++) {
        float k_j = c->by_channel ? next.k[j] * next.decays[j] : next.k[j];
        S_k[0] += WIDE_AT(tile, j * TILE) * k_j;
        S_k[1] += WIDE_AT(tile, j * TILE + WIDE) * k_j;
    }
    for (int64_t i = 0; i < count; i++) {
        a = next;
        /* After the last token its own key again, for nothing. */
        if (i + 1 < count) next = token_of(c, w, i + 1, r);
        load_values(c, s->b, t + i, hv, i_v, rows, TILE, v);
        if (i + AHEAD < count) {
            int64_t ahead = t + i + AHEAD;
            fetch(c->v, s->b * c->v_b + ahead * c->v_t + hv * c->v_h + i_v * c->v_v, rows,
                  c->token_type);
            fetch(c->o, ((s->b * c->T + ahead) * c->HV + hv) * c->V + i_v, rows, c->token_type);
        }
        for (int x = 0; x < 2; x++) u[x] = (WIDE_AT(v, x * WIDE) - S_k[x] * a.decay) * a.beta;
        if (c->by_channel)
            step_of_tile(tile, w->width, a, next, 1, u, S_k, S_q);
        else
            step_of_tile(tile, w->width, a, next, 0, u, S_k, S_q);
        memcpy(o, S_q, sizeof(o));
        store_values(c, c->o, s->b, t + i, hv, i_v, rows, TILE, o);
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
        for (int64_t i = i_first; i < i_end; i++) {
            int64_t r = i / of_head, i_v = i % of_head * TILE;
            float *tile = w->tiles + i * w->width * TILE;
            walk_tile(c, w, s, s->start + t, count, r, h * R + r, i_v, tile);
        }
    }
    for (int64_t i = i_first; i < i_end; i++)
        store_tile(c, s, h * R + i / of_head, i % of_head * TILE, w->tiles + i * w->width * TILE);
}
