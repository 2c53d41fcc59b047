/* A team of threads for one call: OpenMP's, which is torch's own pool, or just the caller.
 *
 * A call opens one region and meets at barriers inside it; opening a region costs more than a barrier does.
 */
#pragma once

#include <omp.h>

#include "level.h"

namespace {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* A half-open range of work items. */
struct Range {
    int64_t begin, end;
};

/* The calling thread's place among those that run a region together. */
struct Team {
    int64_t index, size;

    /* Wait until all of the team are here; what they wrote before is then visible. */
    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }

    /* This thread's share of `count` items: contiguous, and a multiple of `step` items but for the last. */
    Range share(int64_t count, int64_t step = 1) const {
        const int64_t steps = (count + step - 1) / step;
        const int64_t begin = steps * index / size * step, end = steps * (index + 1) / size * step;
        return {begin, end < count ? end : count};
    }
};

/* Run `body(Team)` on `num_threads` threads, or on fewer if OpenMP has no more. One thread involves no OpenMP. */
template <class Body>
inline void parallel(int64_t num_threads, const Body &body) {
    if (num_threads <= 1) {
        body(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace
