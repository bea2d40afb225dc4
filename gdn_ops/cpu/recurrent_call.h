/* What a call in C is: its arguments, their dtypes, its sequences and tokens.

   Strides are in numbers, along the axes that their names end in. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if !defined(__FLT16_MAX__) && defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "subnormal.h"

enum { FLOAT32, BFLOAT16, FLOAT16 };
/* Numbers of a vector, to which keys and queries are padded; rows of a state that are walked
   together, with 4 of which a sum would wait for itself; numbers of a vector that no sum goes
   across; rows that are lanes of a tile; the largest K. */
#ifdef __AVX512F__
enum { LANES = 8, ROWS = LANES, WIDE = 16, TILE = 2 * WIDE, MAX_K = 256 };
#else
enum { LANES = 8, ROWS = LANES, WIDE = 8, TILE = 2 * WIDE, MAX_K = 256 };
#endif
/* Results: a slot outside the pool, and nothing was written; no memory for what a thread needs. */
enum { DONE, SLOT_OUTSIDE, NO_MEMORY };

typedef struct {
    const void *q, *k, *v, *g, *beta, *initial_state;
    void *state, *o; /* state: the final states, or the pool, which initial_state then is too */
    const void *state_indices, *num_accepted_tokens, *cu_seqlens, *read_indices;
    const void *has_initial_state; /* bool [N] */
    /* Of the gradient: d_o and dfinal_state are read, the others written, and contiguous. */
    const void *d_o, *dfinal_state;
    void *dq, *dk, *dv, *dg, *dbeta, *dinitial_state;
    int64_t B, T, H, HV, K, V, N, slots, columns; /* of a table [N, columns]; 0: slots [N] */
    int64_t q_b, q_t, q_h, q_k, k_b, k_t, k_h, k_k, v_b, v_t, v_h, v_v;
    int64_t g_b, g_t, g_h, g_k, beta_b, beta_t, beta_h;
    int64_t initial_state_n, initial_state_h, state_n, state_h;
    int64_t indices_n, indices_s, accepted_n, cu_seqlens_n, read_n, has_initial_state_n;
    int64_t null_index;
    int64_t do_b, do_t, do_h, do_v, dfinal_n, dfinal_h, dfinal_v, dfinal_k;
    int32_t token_type, beta_type, state_type;
    int32_t wide_indices, wide_accepted, wide_cu_seqlens, wide_read; /* int64, else int32 */
    int32_t by_channel, use_qk_l2norm, is_functional, has_tiles, threads;
    float scale;
} Call;

/* Batch row, first token and number of tokens; the slots that are read and, of [N], written. */
typedef struct {
    int64_t b, start, length, read, write;
    int is_live, has_state;
} Sequence;

/* Of one key head and `capacity` tokens, what a thread makes of them, and tiles of states. */
typedef struct {
    float *kq, *gates, *decays; /* [capacity, 2, width], [R, capacity, 2], [R, capacity, width] */
    float *tiles;               /* [R cdiv(V, TILE), width, TILE] */
    float *inverse_norms;       /* [capacity, 2], of keys and queries; NULL where nobody asks */
    float *pairs;               /* [capacity / 2, 4], of recurrent_tile.h */
    int64_t width, capacity;
} Scratch;

/* What a token reads; its decay is one number, or where `decays` is given one for each channel. */
typedef struct {
    const float *k, *q, *decays;
    float decay, beta;
} Token;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16)));
#define AT(p, j) (*(Vector *)((p) + (j)))
#define WIDE_AT(p, j) (*(Wide *)((p) + (j)))
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))

static inline int64_t least(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

/* Numbers in whole lines of the cache: a vector that lies in two takes twice as long. */
static inline int64_t whole(int64_t x)
{
    return (x + 15) / 16 * 16;
}

/* Tiles of the state of a value head. */
static inline int64_t tiles_of_head(const Call *c)
{
    return (c->V + TILE - 1) / TILE;
}

static inline int64_t width_of(int64_t K)
{
    return (K + LANES - 1) / LANES * LANES;
}

static int64_t integer(const void *p, int64_t i, int is_wide)
{
    return is_wide ? ((const int64_t *)p)[i] : ((const int32_t *)p)[i];
}

static inline float widen(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
static inline uint16_t narrow(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : 0x7fc00000;
    return (uint16_t)(bits >> 16);
}

/* float16: for x86 GCC knows the type from version 12 on. */
#ifdef __FLT16_MAX__
typedef _Float16 Half;
#define WIDEN_HALF (float)
#define NARROW_HALF (_Float16)
#else
typedef uint16_t Half;
#define WIDEN_HALF(x) _cvtsh_ss(x)
#define NARROW_HALF(x) _cvtss_sh(x, 0)
#endif

#define LOAD(TYPE, CONVERT)                                                        \
    {                                                                              \
        const TYPE *p = (const TYPE *)from + at;                                   \
        if (stride == 1)                                                           \
            for (int64_t i = 0; i < n; i++) to[i] = CONVERT(p[i]);                 \
        else                                                                       \
            for (int64_t i = 0; i < n; i++) to[i] = CONVERT(p[i * stride]);        \
    }

static inline void copy(float *to, const float *from, int64_t n)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) AT(to, i) = AT(from, i);
    for (; i < n; i++) to[i] = from[i];
}

/* n numbers from element `at` on, as float32. */
static void load(float *to, const void *from, int64_t at, int64_t stride, int64_t n, int type)
{
    if (type == FLOAT32 && stride == 1) copy(to, (const float *)from + at, n);
    else if (type == FLOAT32) LOAD(float, )
    else if (type == BFLOAT16) LOAD(uint16_t, widen)
    else LOAD(Half, WIDEN_HALF)
}

#define STORE(TYPE, CONVERT)                                          \
    {                                                                 \
        TYPE *p = (TYPE *)to + at;                                    \
        for (int64_t i = 0; i < n; i++) p[i] = CONVERT(from[i]);      \
    }

static void store(void *to, int64_t at, const float *from, int64_t n, int type)
{
    if (type == FLOAT32) copy((float *)to + at, from, n);
    else if (type == BFLOAT16) STORE(uint16_t, narrow)
    else STORE(Half, NARROW_HALF)
}

/* Padding, and the slots of a sequence, by the rules of docs/semantics.md. */
static int find_sequence(const Call *c, int64_t n, Sequence *found)
{
    Sequence s = {n, 0, c->T, n, n, 1, c->initial_state != NULL};
    if (c->cu_seqlens) {
        int64_t start = integer(c->cu_seqlens, n * c->cu_seqlens_n, c->wide_cu_seqlens);
        int64_t end = integer(c->cu_seqlens, (n + 1) * c->cu_seqlens_n, c->wide_cu_seqlens);
        s.b = 0;
        s.start = start < 0 ? 0 : least(start, c->T);
        end = least(end, c->T);
        s.length = end > s.start ? end - s.start : 0;
    }
    int64_t columns = c->columns ? c->columns : 1, accepted = 1, at = n * c->indices_n;
    if (c->num_accepted_tokens)
        accepted = integer(c->num_accepted_tokens, n * c->accepted_n, c->wide_accepted);
    s.is_live = (s.length > 0 || c->is_functional) && accepted >= 1 && accepted <= columns;
    s.is_live = s.is_live && (!c->columns || s.length <= columns);
    if (s.is_live && c->state_indices) {
        s.write = integer(c->state_indices, at, c->wide_indices);
        s.read = integer(c->state_indices, at + (accepted - 1) * c->indices_s, c->wide_indices);
    }
    if (s.is_live && c->read_indices)
        s.read = integer(c->read_indices, n * c->read_n, c->wide_read);
    if (c->has_initial_state)
        s.has_state = ((const uint8_t *)c->has_initial_state)[n * c->has_initial_state_n] != 0;
    s.is_live = s.is_live && s.read > c->null_index && (c->columns || s.write > c->null_index);
    *found = s;
    if (!s.is_live) return DONE;
    if (s.read >= c->slots || (!c->columns && s.write >= c->slots)) return SLOT_OUTSIDE;
    for (int64_t t = 0; c->columns && t < s.length; t++)
        if (integer(c->state_indices, at + t * c->indices_s, c->wide_indices) >= c->slots)
            return SLOT_OUTSIDE;
    return DONE;
}

static inline float total(Vector x)
{
    Quarter y[LANES / 4];
    memcpy(y, &x, sizeof(x));
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) y[i] += y[i + n];
    return (y[0][0] + y[0][2]) + (y[0][1] + y[0][3]);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (Places){__VA_ARGS__})
#endif

/* The totals of LANES vectors, a lane for each. */
static inline Vector totals(const Vector *x)
{
    Vector y[4], z[2];
    for (int i = 0; i < 4; i++)
        y[i] = SHUFFLE(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        z[i] = SHUFFLE(y[2 * i], y[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(y[2 * i], y[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(z[0], z[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(z[0], z[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

static inline float inner(const float *x, const float *y, int64_t width)
{
    Vector products = {0};
    for (int64_t j = 0; j < width; j += LANES) products += AT(x, j) * AT(y, j);
    return total(products);
}

/* What a row is divided by, which is padded with zeros. */
static inline float norm(const float *x, int64_t width)
{
    return sqrtf(inner(x, x, width) + 1e-6f);
}

/* Tokens between the one that is read and the one that is fetched. */
enum { AHEAD = 3 };

/* Fetch n numbers that lie together, to be read or written, into the second cache: the first has
   few requests at a time, and waits for them (a prefill of small heads takes 0.92; Intel Xeon,
   2026-11-30). */
static inline void fetch(const void *p, int64_t at, int64_t n, int type)
{
    int64_t bytes = type == FLOAT32 ? 4 : 2;
    const char *first = (const char *)p + at * bytes;
    for (int64_t i = 0; i < n * bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

/* A key or query of a token, padded with zeros, normalised and scaled; the inverse of its norm. */
static inline float prepare_row(const Call *c, float *to, const void *x, int64_t at, int64_t stride,
                                int64_t width, float scale)
{
    const float *from = to;
    if (c->token_type == FLOAT32 && stride == 1 && c->K == width) {
        from = (const float *)x + at;
    } else {
        memset(to, 0, width * sizeof(float));
        load(to, x, at, stride, c->K, c->token_type);
    }
    float inverse = c->use_qk_l2norm ? 1 / norm(from, width) : 1;
    for (int64_t j = 0; j < width; j += LANES) AT(to, j) = AT(from, j) * (inverse * scale);
    return inverse;
}

/* Keys and queries of `count` tokens, normalised and scaled, and gates of the value heads, where a
   sequence has `length` from the first on. */
static void prepare(const Call *c, const Scratch *w, int64_t b, int64_t h, int64_t first,
                    int64_t count, int64_t length)
{
    int64_t K = c->K, R = c->HV / c->H, width = w->width;
    for (int64_t i = 0; i < count; i++) {
        int64_t t = first + i;
        float *k = w->kq + i * 2 * width;
        int64_t at_k = b * c->k_b + t * c->k_t + h * c->k_h;
        int64_t at_q = b * c->q_b + t * c->q_t + h * c->q_h;
        if (i + AHEAD < length) {
            fetch(c->k, at_k + AHEAD * c->k_t, K, c->token_type);
            fetch(c->q, at_q + AHEAD * c->q_t, K, c->token_type);
        }
        float of_k = prepare_row(c, k, c->k, at_k, c->k_k, width, 1);
        float of_q = prepare_row(c, k + width, c->q, at_q, c->q_k, width, c->scale);
        if (w->inverse_norms) {
            w->inverse_norms[2 * i] = of_k;
            w->inverse_norms[2 * i + 1] = of_q;
        }
        for (int64_t r = 0; r < R; r++) {
            int64_t hv = h * R + r, at = b * c->g_b + t * c->g_t + hv * c->g_h;
            int64_t at_beta = b * c->beta_b + t * c->beta_t + hv * c->beta_h;
            float *gates = w->gates + (r * w->capacity + i) * 2;
            gates[0] = c->g && !c->by_channel ? expf(((const float *)c->g)[at]) : 1;
            gates[1] = 1;
            if (c->beta) load(gates + 1, c->beta, at_beta, 1, 1, c->beta_type);
            if (!c->by_channel) continue;
            float *decays = w->decays + (r * w->capacity + i) * width;
            memset(decays, 0, width * sizeof(float));
            load(decays, c->g, at, c->g_k, K, FLOAT32);
            for (int64_t j = 0; j < K; j++) decays[j] = expf(decays[j]);
        }
    }
}

/* Tokens `first` to `end - 1` of those that are prepared as tokens that change no state, if their
   values are zero. */
static void pad(const Call *c, const Scratch *w, int64_t first, int64_t end)
{
    memset(w->kq + first * 2 * w->width, 0, (end - first) * 2 * w->width * sizeof(float));
    for (int64_t r = 0; r < c->HV / c->H; r++)
        for (int64_t x = 2 * first; x < 2 * end; x++) w->gates[r * w->capacity * 2 + x] = 1;
}

/* Token i of those that were prepared, for value head r of the key head. */
static inline Token token_of(const Call *c, const Scratch *w, int64_t i, int64_t r)
{
    int64_t place = r * w->capacity + i;
    const float *k = w->kq + i * 2 * w->width;
    const float *decays = c->by_channel ? w->decays + place * w->width : NULL;
    return (Token){k, k + w->width, decays, w->gates[2 * place], w->gates[2 * place + 1]};
}

/* A number for each of some rows; of `all` rows with a size that the compiler knows. */
static inline void load_rows(float *to, const void *from, int64_t at, int64_t stride, int64_t rows,
                             const int64_t all, int type)
{
    if (rows == all && type == FLOAT32 && stride == 1)
        memcpy(to, (const float *)from + at, all * sizeof(float));
    else
        load(to, from, at, stride, rows, type);
}

static inline void store_rows(void *to, int64_t at, const float *from, int64_t rows,
                              const int64_t all, int type)
{
    if (rows == all && type == FLOAT32)
        memcpy((float *)to + at, from, all * sizeof(float));
    else
        store(to, at, from, rows, type);
}

static inline void load_values(const Call *c, int64_t b, int64_t t, int64_t hv, int64_t i_v,
                               int64_t rows, const int64_t all, float *v)
{
    int64_t at = b * c->v_b + t * c->v_t + hv * c->v_h + i_v * c->v_v;
    load_rows(v, c->v, at, c->v_v, rows, all, c->token_type);
}

/* Rows of `to`, `[B, T, HV, V]`: the output, or the gradient of the values. */
static inline void store_values(const Call *c, void *to, int64_t b, int64_t t, int64_t hv,
                                int64_t i_v, int64_t rows, const int64_t all, const float *from)
{
    int64_t at = ((b * c->T + t) * c->HV + hv) * c->V + i_v;
    store_rows(to, at, from, rows, all, c->token_type);
}

/* Where a row of a state is that a sequence reads, and writes. */
static inline int64_t first_row(const Call *c, const Sequence *s, int64_t hv, int64_t i_v)
{
    return s->read * c->initial_state_n + hv * c->initial_state_h + i_v * c->K;
}

static inline int64_t last_row(const Call *c, const Sequence *s, int64_t hv, int64_t i_v)
{
    return s->write * c->state_n + hv * c->state_h + i_v * c->K;
}

/* The number of this thread among those of a call. */
static inline int64_t thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* A call: `run` has the sequences and for each thread memory of `numbers`, in whole lines. */
static int run_call(const Call *c, int64_t numbers,
                    void (*run)(const Call *, const Sequence *, float *, int64_t))
{
    float *memory = aligned_alloc(64, c->threads * numbers * sizeof(float));
    Sequence *sequences = malloc((c->N + 1) * sizeof(Sequence));
    int result = sequences && memory ? DONE : NO_MEMORY;
    for (int64_t n = 0; result == DONE && n < c->N; n++)
        result = find_sequence(c, n, &sequences[n]);
    if (result == DONE) run(c, sequences, memory, numbers);
    free(memory);
    free(sequences);
    return result;
}
