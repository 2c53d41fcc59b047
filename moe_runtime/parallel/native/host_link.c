/* The ranks of one host over one shared mapping: phases, agreements, and the exchange of tokens and partial sums.
 *
 * Everything is ordered by phases, which all ranks count alike. A phase is complete once the ranks that it expects
 * have arrived; the last of them publishes its number and wakes whoever sleeps for it. No rank writes for a phase
 * before the phase before it is complete, which is all that keeps a buffer from being overwritten while it is read:
 *
 *   - tokens (one buffer): rows are read between a dispatch and the last phase of its combine, in which every rank
 *     arrives after its reads; they are written again in the next dispatch.
 *   - partial sums (two halves, used in turn): a half written in phase p is read before its reader arrives in the
 *     next phase that expects it, and is written again two chunks later.
 *   - agreed values (two slots, used in turn): the same, with every rank expected every time.
 *
 * A wait that has slept for a slice, or that a signal woke, asks `on_wait` whether to go on, so that Python can look after
 * signals and peers. A call that ends early leaves the link unusable. One link belongs to one thread of a process. Only C11
 * atomics and Linux futexes are used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sum_rows.h"

enum { MAX_RANKS = 64, MAX_VALUES = 32 };

/* What the calls return; the Python side knows these numbers. */
enum { DONE = 0, ENDED = 1, PEER_LEFT = 2, BAD_EXPERT = 3 };

typedef struct {
    _Alignas(64) _Atomic uint32_t value; /* a cache line of its own */
} word;

/* What a rank says of itself. */
typedef struct {
    _Alignas(64) _Atomic uint32_t phase; /* the last that it came to */
    _Atomic uint32_t left;               /* 1 once it will take part no more */
} presence;

/* The start of the mapping; all zero before the first phase. */
typedef struct {
    word arrived;     /* arrivals of all phases so far, modulo 2^32 */
    word done[2];     /* last complete phase of even and of odd number: futex words */
    word sleepers[2]; /* processes that may sleep on done[i]; too high after a sleeper was killed, never too low */
    presence of_rank[MAX_RANKS];
    _Alignas(64) int64_t agreed[2][MAX_RANKS][MAX_VALUES];
} control;

/* Told how long a wait has lasted; nonzero ends it. */
typedef int32_t (*wait_callback)(int64_t waited_ns);

typedef struct {
    control *shared;
    int32_t rank, size;
    int64_t spin_ns, slice_ns;
    wait_callback on_wait;
    uint32_t phase;        /* the phase this rank is in */
    uint32_t target;       /* arrivals that complete it */
    uint32_t agreements, chunks; /* made so far: they choose slot and half */
    int64_t waited_ns;   /* that this rank has waited for others in all */
    int64_t sent[2];     /* bytes written for others: tokens by dispatch, partial sums by combine */
} host_link;

/* Set by Python, field by field in this order. */
typedef struct {
    char *x, *weights, *parts; /* in the mapping */
    int32_t *ids;              /* in the mapping */
    const int32_t *local_of_expert, *rank_of_expert;
    int64_t hidden, top_k, num_experts, chunk_tokens;
} buffers;

typedef struct {
    int64_t counts[MAX_RANKS]; /* tokens of each rank */
    int64_t firsts[MAX_RANKS]; /* row of each rank's first token */
    int64_t rows, most;        /* tokens of all ranks, and of the one that has most */
} step;

/* What dispatch and combine of one step are given. */
typedef struct {
    host_link *link;
    const buffers *buffers;
    const step *step;
} exchange;

/* ------------------------------------------------------------------ phases */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wake_all(word *w) { syscall(SYS_futex, &w->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static int reached(word *done, uint32_t phase) {
    return (int32_t)(atomic_load_explicit(&done->value, memory_order_acquire) - phase) >= 0;
}

static int spin(const host_link *link, word *done, uint32_t phase) {
    if (link->spin_ns == 0) return 0;
    int64_t end = now_ns() + link->spin_ns;
    do {
        for (int i = 0; i < 32; i++) {
            if (reached(done, phase)) return 1;
            relax();
        }
    } while (now_ns() < end);
    return 0;
}

/* 0 .. size-1 where that rank left before it came to `phase`, else -1. One that did its part may leave. */
static int left_before(const host_link *link, uint32_t phase) {
    for (int r = 0; r < link->size; r++) {
        presence *p = &link->shared->of_rank[r];
        if (atomic_load(&p->left) && (int32_t)(atomic_load(&p->phase) - phase) < 0) return r;
    }
    return -1;
}

static int sleep_until(host_link *link, uint32_t phase, int64_t began) {
    control *shared = link->shared;
    word *done = &shared->done[phase & 1], *sleepers = &shared->sleepers[phase & 1];
    struct timespec slice = {link->slice_ns / 1000000000, link->slice_ns % 1000000000};
    if (spin(link, done, phase)) return DONE;
    for (;;) {
        /* Counted before the last look, as the publisher looks at the count after publishing: one of the two sees
         * the other, or the futex sees that the word has changed. */
        atomic_fetch_add(&sleepers->value, 1);
        uint32_t seen = atomic_load(&done->value);
        long failed = 0;
        int complete = (int32_t)(seen - phase) >= 0;
        int left = !complete && left_before(link, phase) >= 0;
        if (!complete && !left) failed = syscall(SYS_futex, &done->value, FUTEX_WAIT, seen, &slice, NULL, 0);
        int interrupted = failed && errno != EAGAIN; /* timed out, or a signal came */
        atomic_fetch_sub(&sleepers->value, 1);
        if (complete || reached(done, phase)) return DONE;
        if (left) return PEER_LEFT;
        if (interrupted && link->on_wait(now_ns() - began)) return ENDED;
    }
}

/* Wait until the phase that this rank is in is complete. */
static int await_phase(host_link *link) {
    uint32_t phase = link->phase;
    if (reached(&link->shared->done[phase & 1], phase)) return DONE;
    int64_t began = now_ns();
    int state = sleep_until(link, phase, began);
    link->waited_ns += now_ns() - began;
    return state;
}

/* Enter the next phase; the rank may write for it once this returns DONE. */
static int begin_phase(host_link *link, uint32_t expected) {
    int state = await_phase(link);
    if (state != DONE) return state;
    link->phase++;
    link->target += expected;
    return DONE;
}

static void come_to_phase(host_link *link) {
    atomic_store_explicit(&link->shared->of_rank[link->rank].phase, link->phase, memory_order_relaxed);
}

static void arrive(host_link *link) {
    control *shared = link->shared;
    uint32_t phase = link->phase;
    come_to_phase(link);
    if (atomic_fetch_add(&shared->arrived.value, 1) + 1 != link->target) return;
    atomic_store(&shared->done[phase & 1].value, phase);
    if (atomic_load(&shared->sleepers[phase & 1].value) != 0) wake_all(&shared->done[phase & 1]);
}

/* ------------------------------------------------------------------ what Python calls */

int64_t moe_control_bytes(void) { return sizeof(control); }

host_link *moe_link_new(void *shared, int32_t rank, int32_t size, int64_t spin_ns, int64_t slice_ns,
                        wait_callback on_wait) {
    host_link *link = calloc(1, sizeof *link);
    if (link == NULL) return NULL;
    *link = (host_link){.shared = shared, .rank = rank, .size = size, .on_wait = on_wait};
    link->spin_ns = spin_ns;
    link->slice_ns = slice_ns;
    return link;
}

void moe_link_free(host_link *link) { free(link); }

/* Where the nanoseconds stand that this rank has waited for others. */
const int64_t *moe_waited_ns(const host_link *link) { return &link->waited_ns; }

/* Where the two counts of bytes stand that this rank has written for others. */
const int64_t *moe_sent_bytes(const host_link *link) { return link->sent; }

/* Tell the others that this rank will take part no more. */
void moe_leave(host_link *link) {
    atomic_store(&link->shared->of_rank[link->rank].left, 1);
    wake_all(&link->shared->done[0]);
    wake_all(&link->shared->done[1]);
}

/* 1 where `rank` has not come to the phase that this rank is in. */
int moe_is_behind(const host_link *link, int32_t rank) {
    return (int32_t)(atomic_load(&link->shared->of_rank[rank].phase) - link->phase) < 0;
}

/* After PEER_LEFT: the rank that left. */
int moe_who_left(const host_link *link) { return left_before(link, link->phase); }

/* all[size][num_values]: every rank's `values`. */
int moe_agree(host_link *link, const int64_t *values, int32_t num_values, int64_t *all) {
    int64_t(*slot)[MAX_VALUES] = link->shared->agreed[link->agreements & 1];
    int state = begin_phase(link, (uint32_t)link->size);
    if (state != DONE) return state;
    memcpy(slot[link->rank], values, (size_t)num_values * sizeof *values);
    arrive(link);
    if ((state = await_phase(link)) != DONE) return state;
    link->agreements++;
    for (int r = 0; r < link->size; r++)
        memcpy(all + (int64_t)r * num_values, slot[r], (size_t)num_values * sizeof *values);
    return DONE;
}

/* Show this rank's tokens to all; then all ranks' tokens stand in the mapping, in rank order without gaps.
 * local_ids[rows][top_k] becomes this rank's expert of each choice, -1 where it lives elsewhere. */
int moe_dispatch(const exchange *e, const void *x, int64_t x_row_bytes, const int64_t *ids, const void *weights,
                 int64_t weights_row_bytes, int64_t *local_ids) {
    host_link *link = e->link;
    const buffers *b = e->buffers;
    const step *s = e->step;
    int64_t count = s->counts[link->rank], first = s->firsts[link->rank];
    uint32_t expected = 0; /* only those that have tokens are waited for */
    for (int r = 0; r < link->size; r++) expected += s->counts[r] > 0;
    if (expected == 0) return DONE;
    int state = begin_phase(link, expected);
    if (state != DONE) return state;
    if (count > 0) {
        int32_t *mine = b->ids + first * b->top_k;
        for (int64_t i = 0; i < count * b->top_k; i++) {
            if (ids[i] < 0 || ids[i] >= b->num_experts) return BAD_EXPERT;
            mine[i] = (int32_t)ids[i];
        }
        memcpy(b->x + first * x_row_bytes, x, (size_t)(count * x_row_bytes));
        memcpy(b->weights + first * weights_row_bytes, weights, (size_t)(count * weights_row_bytes));
        link->sent[0] += count * (x_row_bytes + weights_row_bytes + b->top_k * (int64_t)sizeof *mine);
        arrive(link);
    } else
        come_to_phase(link);
    if ((state = await_phase(link)) != DONE) return state;
    for (int64_t i = 0; i < s->rows * b->top_k; i++) local_ids[i] = b->local_of_expert[b->ids[i]];
    return DONE;
}

static int lives_here(const buffers *b, const int32_t *ids) {
    for (int64_t k = 0; k < b->top_k; k++)
        if (b->local_of_expert[ids[k]] >= 0) return 1;
    return 0;
}

/* Which ranks hold one of these experts, a bit each. */
static uint64_t ranks_of(const buffers *b, const int64_t *ids) {
    uint64_t ranks = 0;
    for (int64_t k = 0; k < b->top_k; k++) ranks |= 1ull << b->rank_of_expert[ids[k]];
    return ranks;
}

/* A chunk of combine: tokens start..end of every rank, and where their partial sums lie. */
typedef struct {
    int64_t start, end, row_bytes;
    char *half;
} chunk;

/* Partial sums that `writer` has for the tokens of `reader`. */
static char *parts_of(const host_link *link, const buffers *b, const chunk *c, int64_t writer, int64_t reader) {
    return c->half + (writer * link->size + reader) * b->chunk_tokens * c->row_bytes;
}

static void write_parts(host_link *link, const buffers *b, const step *s, const chunk *c, const char *y) {
    for (int64_t r = 0; r < link->size; r++) {
        char *parts = parts_of(link, b, c, link->rank, r);
        for (int64_t t = c->start; r != link->rank && t < c->end && t < s->counts[r]; t++) {
            int64_t row = s->firsts[r] + t;
            if (!lives_here(b, b->ids + row * b->top_k)) continue;
            memcpy(parts + (t - c->start) * c->row_bytes, y + row * c->row_bytes, (size_t)c->row_bytes);
            link->sent[1] += c->row_bytes;
        }
    }
}

static void sum_parts(const host_link *link, const buffers *b, const step *s, const chunk *c, const char *y,
                      const int64_t *ids, int dtype, char *out) {
    int64_t me = link->rank;
    for (int64_t t = c->start; t < c->end && t < s->counts[me]; t++) {
        uint64_t ranks = ranks_of(b, ids + t * b->top_k);
        const void *rows[MAX_RANKS];
        int num_rows = 0;
        for (int64_t r = 0; r < link->size; r++) {
            if (!(ranks >> r & 1)) continue;
            rows[num_rows++] = r == me ? y + (s->firsts[me] + t) * c->row_bytes
                                       : parts_of(link, b, c, r, me) + (t - c->start) * c->row_bytes;
        }
        sum_rows(out + t * c->row_bytes, rows, num_rows, b->hidden, dtype);
    }
}

/* out[count][hidden]: for each token of this rank the sum, in rank order, of the partial sums of the ranks that hold
 * some of its experts. y[rows][hidden] are this rank's partial sums of all tokens; ids are what this rank dispatched:
 * those in the mapping may be overwritten once every rank has arrived in the last phase. `meanwhile`, unless it is null, is
 * called with `with` before the first wait for sums of others. */
int moe_combine(const exchange *e, const void *y, const int64_t *ids, int32_t dtype, void *out,
                void (*meanwhile)(void *), void *with) {
    host_link *link = e->link;
    const buffers *b = e->buffers;
    const step *s = e->step;
    int64_t row_bytes = b->hidden * (dtype == FLOAT32 ? 4 : 2), me = link->rank;
    for (int64_t start = 0; start < s->most; start += b->chunk_tokens) {
        chunk c = {.start = start, .end = start + b->chunk_tokens, .row_bytes = row_bytes};
        c.half = b->parts + (link->chunks & 1) * link->size * link->size * b->chunk_tokens * row_bytes;
        int state = begin_phase(link, (uint32_t)link->size);
        if (state != DONE) return state;
        write_parts(link, b, s, &c, y);
        arrive(link);
        if (start == 0 && meanwhile != NULL) meanwhile(with);
        link->chunks++;
        if (start >= s->counts[me]) continue; /* nothing to sum: the next phase waits for this one */
        if ((state = await_phase(link)) != DONE) return state;
        sum_parts(link, b, s, &c, y, ids, dtype, out);
    }
    return DONE;
}

/* out[i] = the sum of rows[0..num_rows), each of `width` elements: for tests of the arithmetic. */
void moe_sum_rows(void *out, const void *const *rows, int32_t num_rows, int64_t width, int32_t dtype) {
    sum_rows(out, rows, num_rows, width, dtype);
}
