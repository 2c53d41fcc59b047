/* Reading memory as fast as this machine can: what the kernels' own reading is measured against. */
#include "simd.h"
#include "threads.h"

namespace {


/* XOR of the 64-bit words at `stride` bytes from each other in STREAMS equal runs of `bytes` / STREAMS. */
template <int STREAMS>
inline int64_t read_runs(const char *data, int64_t bytes, int64_t prefetch) {
    const int64_t run = bytes / STREAMS / LINE * LINE;
    __m256i folded[STREAMS] = {};
    for (int64_t at = 0; at < run; at += LINE) {
        for (int s = 0; s < STREAMS; s++) {
            const char *line = data + s * run + at;
            _mm_prefetch(line + prefetch, _MM_HINT_T0);
            folded[s] ^= _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line));
            folded[s] ^= _mm256_loadu_si256(reinterpret_cast<const __m256i *>(line + LINE / 2));
        }
    }
    __m256i all = folded[0];
    for (int s = 1; s < STREAMS; s++) all ^= folded[s];
    return all[0] ^ all[1] ^ all[2] ^ all[3];
}

}  // namespace

/* Read `bytes` bytes once: by each thread its share, in `num_streams` (1, 2, 4 or 8) runs side by side, touching each
 * line `prefetch` bytes ahead of its use. Returns a value that depends on what was read. */
MOE_EXPORT(int64_t, moe_read_stream)
(const char *data, int64_t bytes, int64_t num_streams, int64_t prefetch, int64_t num_threads) {
    int64_t folded = 0;
    parallel(num_threads, [&](Team team) {
        const Range share = team.share(bytes, LINE);
        const char *begin = data + share.begin;
        const int64_t size = share.end - share.begin;
        const int64_t own = num_streams == 8   ? read_runs<8>(begin, size, prefetch)
                            : num_streams == 4 ? read_runs<4>(begin, size, prefetch)
                            : num_streams == 2 ? read_runs<2>(begin, size, prefetch)
                                               : read_runs<1>(begin, size, prefetch);
        __atomic_fetch_xor(&folded, own, __ATOMIC_RELAXED);
    });
    return folded;
}
