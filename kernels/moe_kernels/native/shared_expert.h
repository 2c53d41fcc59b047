/* The shared expert, computed and added in two steps: sums of other ranks may come in between. */
#pragma once

#include "layers.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t SERIAL_VALUES = 1 << 16;  // with fewer, a thread is done before a second one has woken

/* out = x + (routed + sigmoid(gate) * shared), rounded where tensors between the operations would be. */
template <class Y>
inline void combine(const Tokens &tokens, const Y *routed, const Y *gate, const Y *shared, Y *out) {
    const Y *x = static_cast<const Y *>(tokens.x);
    parallel(tokens.count * tokens.hidden < SERIAL_VALUES ? 1 : tokens.threads, [&](Team team) {
        const Range own = team.share(tokens.count);
        for (int64_t t = own.begin; t < own.end; t++) {
            const vec weight = rounded<Y>(sigmoid(broadcast(load_part(gate + t, 1)[0])));
            for (int64_t h = t * tokens.hidden; h < (t + 1) * tokens.hidden; h += WIDTH) {
                const int64_t lanes = at_most(WIDTH, (t + 1) * tokens.hidden - h);
                const vec ours = rounded<Y>(weight * load_part(shared + h, lanes));
                const vec experts = rounded<Y>(load_part(routed + h, lanes) + ours);
                store_part(out + h, load_part(x + h, lanes) + experts, lanes);
            }
        }
    });
}

/* What the shared expert and its gate give for `normed`: computed and added apart, as sums of other ranks may come in
 * between. Lies in this thread's scratch. */
class SharedSums {
   public:
    SharedSums(const Tokens &tokens, const SharedExpert &layer, const void *normed)
        : tokens_(tokens), layer_(layer), normed_(normed) {}

    void compute() {
        const int64_t T = tokens_.count, both = layer_.gate_up.rows, one = both / 2;
        char *gate_up, *inner;
        const auto parts = [&](auto &&take) {
            gate_up = take(T * both * tokens_.size());
            inner = take(T * one * tokens_.size());
            shared_ = take(T * tokens_.hidden * tokens_.size());
            gate_ = take(T * tokens_.size());
        };
        failed = !take_parts(parts) || tokens_.linear(normed_, layer_.gate_up, gate_up);
        if (failed) return;
        MOE_NAME(moe_silu_and_mul)(gate_up, both, inner, T, one, tokens_.is_bf16, tokens_.threads);
        failed = tokens_.linear(inner, layer_.down, shared_) || tokens_.linear(normed_, layer_.gate, gate_);
    }

    /* out = x + routed + sigmoid(gate) * shared. */
    void add_to(const void *routed, void *out) const {
        if (tokens_.is_bf16)
            add_as<bf16>(routed, out);
        else
            add_as<float>(routed, out);
    }

    bool failed = false;  // for want of memory

   private:
    template <class Y>
    void add_as(const void *routed, void *out) const {
        combine(tokens_, static_cast<const Y *>(routed), reinterpret_cast<const Y *>(gate_),
                reinterpret_cast<const Y *>(shared_), static_cast<Y *>(out));
    }

    const Tokens &tokens_;
    const SharedExpert &layer_;
    const void *normed_;
    char *shared_, *gate_;
};

}  // namespace
