/* Memory that a call needs for its time, kept for the next call: one block for each source file and calling thread. So what
 * holds parts of it may call what other files export, but nothing of its own file that reserves. */
#pragma once

#include <cstdlib>

#include "level.h"

namespace {

/* Hands out parts of a block; counts first what is wanted, so that a call allocates at most once. */
class Scratch {
   public:
    static constexpr int64_t ALIGNMENT = 64;

    /* Make `bytes` available, counted with `size_of`. False: there is no memory. */
    bool reserve(int64_t bytes) {
        used_ = 0;
        if (bytes <= size_) return true;
        free(block_);
        block_ = static_cast<char *>(aligned_alloc(ALIGNMENT, static_cast<size_t>(bytes)));
        size_ = block_ ? bytes : 0;
        return block_ != nullptr;
    }

    template <class T>
    static int64_t size_of(int64_t count) {
        return (count * static_cast<int64_t>(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }

    template <class T>
    T *take(int64_t count) {
        T *part = reinterpret_cast<T *>(block_ + used_);
        used_ += size_of<T>(count);
        return part;
    }

    ~Scratch() { free(block_); }

   private:
    char *block_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

}  // namespace
