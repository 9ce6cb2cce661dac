// Running out of memory. An exception that leaves a parallel region, or a function that Python calls, ends the process:
// threads keep it in a Memory, and functions return a status, of which Python makes an error.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace kitae {

constexpr int64_t OUT_OF_MEMORY = -1;

// Whether threads that work together found memory enough.
class Memory {
  public:
    // Does work(), but no more once there was too little: what it would read may be missing.
    template <class Work> void run(Work work) {
        if (is_out()) return;
        try {
            work();
        } catch (const std::bad_alloc&) {
            is_out_.store(true, std::memory_order_relaxed);
        }
    }
    bool is_out() const { return is_out_.load(std::memory_order_relaxed); }

    // Once the threads are done.
    void check() const {
        if (is_out()) throw std::bad_alloc();
    }

  private:
    std::atomic<bool> is_out_{false};
};

// What a function returns to Python: the result of call(), which is not below 0, or OUT_OF_MEMORY.
template <class Call> int64_t status_of(Call call) {
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

}  // namespace kitae
