/* Gated delta rule, token by token, on a CPU: recurrent and recurrent_ in one pass over the states.

       S <- exp(g) S + u k^T     u = beta (v - exp(g) S k)     o = scale S q

   Built where it is first called (build.py) and called by recurrent.py, which repeats `Call`.
   Keys and queries are first made float32, normalised and scaled. Then a task has ROWS rows of the
   state of a sequence and value head, which no other task reads, and takes them from token to token
   in the first cache. A row is read once for S k and once more, from the cache, for the rest, so
   that the state moves through memory once in each direction. A float32 state is updated where it
   will stay; others are widened into a buffer. Arithmetic is float32.

   Strides are in numbers, along the axes that their names end in. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
/* With 4 rows the sums of a row wait for themselves: 1.5 times as long (AMD EPYC, AVX2, GCC 12,
   one thread, 2026-11-30). A row is padded to whole vectors. */
enum { ROWS = 8, LANES = 8, MAX_K = 256 };
/* Results: a slot outside the pool, and nothing was written; no memory for keys and queries. */
enum { DONE, SLOT_OUTSIDE, NO_MEMORY };

typedef struct {
    const void *q, *k, *v, *g, *beta, *initial_state;
    void *state, *o; /* state: the final states, or the pool, which initial_state then is too */
    const void *state_indices, *num_accepted_tokens, *cu_seqlens, *read_indices;
    int64_t B, T, H, HV, K, V, N, slots, columns; /* of a table [N, columns]; 0: slots [N] */
    int64_t q_b, q_t, q_h, q_k, k_b, k_t, k_h, k_k, v_b, v_t, v_h, v_v;
    int64_t g_b, g_t, g_h, g_k, beta_b, beta_t, beta_h;
    int64_t initial_state_n, initial_state_h, state_n, state_h;
    int64_t indices_n, indices_s, accepted_n, cu_seqlens_n, read_n, null_index;
    int32_t token_type, beta_type, state_type;
    int32_t wide_indices, wide_accepted, wide_cu_seqlens, wide_read; /* int64, else int32 */
    int32_t by_channel, use_qk_l2norm, is_functional, threads;
    float scale;
} Call;

/* Batch row, first token and number of tokens; the slots that are read and, of [N], written. */
typedef struct {
    int64_t b, start, length, read, write;
    int is_live;
} Sequence;

/* What tasks share: the sequences, and of each token rows of `width` numbers. */
typedef struct {
    Sequence *sequences;
    float *kq, *decays; /* [B, T, H, 2, width]; with by_channel [B, T, HV, width] */
    int64_t width;
} Work;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16)));
#define AT(p, j) (*(Vector *)((p) + (j)))

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

#define LOAD(TYPE, CONVERT)                                                        \
    {                                                                              \
        const TYPE *p = (const TYPE *)from + at;                                   \
        if (stride == 1)                                                           \
            for (int64_t i = 0; i < n; i++) to[i] = CONVERT(p[i]);                 \
        else                                                                       \
            for (int64_t i = 0; i < n; i++) to[i] = CONVERT(p[i * stride]);        \
    }

/* n numbers from element `at` on, as float32. */
static void load(float *to, const void *from, int64_t at, int64_t stride, int64_t n, int type)
{
    if (type == FLOAT32) LOAD(float, )
    else if (type == BFLOAT16) LOAD(uint16_t, widen)
    else LOAD(_Float16, (float))
}

#define STORE(TYPE, CONVERT)                                          \
    {                                                                 \
        TYPE *p = (TYPE *)to + at;                                    \
        for (int64_t i = 0; i < n; i++) p[i] = CONVERT(from[i]);      \
    }

static void store(void *to, int64_t at, const float *from, int64_t n, int type)
{
    if (type == FLOAT32) STORE(float, )
    else if (type == BFLOAT16) STORE(uint16_t, narrow)
    else STORE(_Float16, (_Float16))
}

/* Padding, and the slots of a sequence, by the rules of docs/semantics.md. */
static int find_sequence(const Call *c, int64_t n, Sequence *found)
{
    Sequence s = {n, 0, c->T, n, n, 1};
    if (c->cu_seqlens) {
        int64_t start = integer(c->cu_seqlens, n * c->cu_seqlens_n, c->wide_cu_seqlens);
        int64_t end = integer(c->cu_seqlens, (n + 1) * c->cu_seqlens_n, c->wide_cu_seqlens);
        s.b = 0;
        s.start = start < 0 ? 0 : start > c->T ? c->T : start;
        end = end < 0 ? 0 : end > c->T ? c->T : end;
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
    s.is_live = s.is_live && s.read > c->null_index && (c->columns || s.write > c->null_index);
    *found = s;
    if (!s.is_live) return DONE;
    if (s.read >= c->slots || (!c->columns && s.write >= c->slots)) return SLOT_OUTSIDE;
    for (int64_t t = 0; c->columns && t < s.length; t++)
        if (integer(c->state_indices, at + t * c->indices_s, c->wide_indices) >= c->slots)
            return SLOT_OUTSIDE;
    return DONE;
}

/* Key and query of a token and key head, normalised and scaled; decays of its value heads. */
static void prepare(const Call *c, const Work *work, int64_t b, int64_t t, int64_t h)
{
    int64_t K = c->K, R = c->HV / c->H;
    float *k = work->kq + ((b * c->T + t) * c->H + h) * 2 * work->width, *q = k + work->width;
    memset(k, 0, 2 * work->width * sizeof(float));
    load(k, c->k, b * c->k_b + t * c->k_t + h * c->k_h, c->k_k, K, c->token_type);
    load(q, c->q, b * c->q_b + t * c->q_t + h * c->q_h, c->q_k, K, c->token_type);
    float of_k = 1, of_q = c->scale;
    if (c->use_qk_l2norm) {
        Vector kk = {0}, qq = {0};
        for (int64_t j = 0; j < K; j += LANES) {
            kk += AT(k, j) * AT(k, j);
            qq += AT(q, j) * AT(q, j);
        }
        float k_squares = 0, q_squares = 0;
        for (int i = 0; i < LANES; i++) {
            k_squares += kk[i];
            q_squares += qq[i];
        }
        of_k /= sqrtf(k_squares + 1e-6f);
        of_q /= sqrtf(q_squares + 1e-6f);
    }
    for (int64_t j = 0; j < K; j++) {
        k[j] *= of_k;
        q[j] *= of_q;
    }
    for (int64_t hv = h * R; c->by_channel && hv < (h + 1) * R; hv++) {
        float *decays = work->decays + ((b * c->T + t) * c->HV + hv) * work->width;
        memset(decays, 0, work->width * sizeof(float));
        load(decays, c->g, b * c->g_b + t * c->g_t + hv * c->g_h, c->g_k, K, FLOAT32);
        for (int64_t j = 0; j < K; j++) decays[j] = expf(decays[j]);
    }
}

static inline float total(Vector x)
{
    Quarter y[LANES / 4];
    memcpy(y, &x, sizeof(x));
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) y[i] += y[i + n];
    return (y[0][0] + y[0][2]) + (y[0][1] + y[0][3]);
}

/* A token: ROWS rows of K numbers from `from` to `to`, which may be the same. The decay is one
   number, or where `decays` is given one for each channel. The rows after these are fetched. */
static inline __attribute__((always_inline)) void
step(const float *from, float *to, int64_t K, const float *k, const float *q, float decay,
     const float *decays, float beta, const float *v, float *o)
{
    Vector sums[ROWS] = {0};
    float u[ROWS];
    for (int64_t j = 0; j < K; j += LANES) {
        Vector k_j = AT(k, j);
        if (decays) k_j *= AT(decays, j);
        for (int r = 0; r < ROWS; r++) sums[r] += AT(from + r * K, j) * k_j;
    }
    for (int r = 0; r < ROWS; r++) {
        u[r] = beta * (v[r] - decay * total(sums[r]));
        sums[r] = (Vector){0};
    }
    for (int64_t j = 0; j < K; j += LANES) {
        Vector k_j = AT(k, j), q_j = AT(q, j), d_j = decay - (Vector){0};
        if (decays) d_j = AT(decays, j);
        for (int r = 0; r < ROWS; r++) {
            Vector S = AT(from + r * K, j) * d_j + u[r] * k_j;
            AT(to + r * K, j) = S;
            sums[r] += S * q_j;
            if (j % 16 == 0) __builtin_prefetch(from + (r + ROWS) * K + j);
        }
    }
    for (int r = 0; r < ROWS; r++) o[r] = total(sums[r]);
}

/* Rows `i_v` to `i_v + ROWS - 1` of a state, from the first token of its sequence to the last. */
static void walk(const Call *c, const Work *work, int64_t n, int64_t hv, int64_t i_v)
{
    const Sequence *s = &work->sequences[n];
    int64_t K = c->K, width = work->width, rows = c->V - i_v < ROWS ? c->V - i_v : ROWS;
    float buffer[ROWS * MAX_K], v[ROWS] = {0}, o[ROWS];
    int64_t last = s->write * c->state_n + hv * c->state_h + i_v * K;
    int64_t first = s->read * c->initial_state_n + hv * c->initial_state_h + i_v * K;
    int is_direct = c->state_type == FLOAT32 && !c->columns && rows == ROWS && K == width;
    is_direct = is_direct && c->initial_state && s->length > 0;
    const float *from = is_direct ? (const float *)c->initial_state + first : buffer;
    float *to = is_direct ? (float *)c->state + last : buffer;
    if (!is_direct) memset(buffer, 0, ROWS * width * sizeof(float));
    for (int64_t r = 0; !is_direct && c->initial_state && r < rows; r++)
        load(buffer + r * width, c->initial_state, first + r * K, 1, K, c->state_type);
    for (int64_t i = 0; i < s->length; i++, from = to) {
        int64_t t = s->start + i, token = s->b * c->T + t;
        const float *k = work->kq + (token * c->H + hv / (c->HV / c->H)) * 2 * width;
        float decay = 1, beta = 1;
        if (c->beta) {
            int64_t at = s->b * c->beta_b + t * c->beta_t + hv * c->beta_h;
            load(&beta, c->beta, at, 1, 1, c->beta_type);
        }
        int64_t at = s->b * c->v_b + t * c->v_t + hv * c->v_h + i_v * c->v_v;
        load(v, c->v, at, c->v_v, rows, c->token_type);
        if (c->by_channel) {
            const float *decays = work->decays + (token * c->HV + hv) * width;
            step(from, to, width, k, k + width, 1, decays, beta, v, o);
        } else {
            if (c->g) decay = expf(((float *)c->g)[s->b * c->g_b + t * c->g_t + hv * c->g_h]);
            step(from, to, width, k, k + width, decay, NULL, beta, v, o);
        }
        store(c->o, (token * c->HV + hv) * c->V + i_v, o, rows, c->token_type);
        int64_t slot = -1;
        if (c->columns)
            slot = integer(c->state_indices, n * c->indices_n + i * c->indices_s, c->wide_indices);
        for (int64_t r = 0; slot > c->null_index && r < rows; r++) {
            int64_t row = slot * c->state_n + hv * c->state_h + (i_v + r) * K;
            store(c->state, row, buffer + r * width, K, c->state_type);
        }
    }
    for (int64_t r = 0; !is_direct && !c->columns && r < rows; r++)
        store(c->state, last + r * K, buffer + r * width, K, c->state_type);
}

static void run(const Call *c, const Work *work)
{
    int64_t blocks = (c->V + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    {
#pragma omp for collapse(3)
        for (int64_t b = 0; b < c->B; b++)
            for (int64_t t = 0; t < c->T; t++)
                for (int64_t h = 0; h < c->H; h++) prepare(c, work, b, t, h);
#pragma omp for collapse(3)
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t hv = 0; hv < c->HV; hv++)
                for (int64_t i = 0; i < blocks; i++)
                    if (work->sequences[n].is_live) walk(c, work, n, hv, i * ROWS);
    }
}

/* New states in pages of 2 MiB: the system hands out fresh memory a page at a time, and with pages of
   4 KiB that takes most of a step (64 MiB: 12 ms to fill, 2.7 so; AMD EPYC, 2026-11-30). */
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

int gdn_recurrent(const Call *c)
{
    if (c->is_functional) ask_for_large_pages(c);
    Work work = {.width = (c->K + LANES - 1) / LANES * LANES};
    int64_t tokens = c->B * c->T * work.width;
    int64_t of_keys = 2 * tokens * c->H, of_decays = c->by_channel ? tokens * c->HV : 0;
    work.sequences = malloc((c->N + 1) * sizeof(Sequence));
    work.kq = malloc((of_keys + of_decays + 1) * sizeof(float));
    int result = work.sequences && work.kq ? DONE : NO_MEMORY;
    for (int64_t n = 0; result == DONE && n < c->N; n++)
        result = find_sequence(c, n, &work.sequences[n]);
    if (result == DONE) {
        work.decays = work.kq + of_keys;
        run(c, &work);
    }
    free(work.kq);
    free(work.sequences);
    return result;
}
