// The threads that run one call together. Every thread walks through the same phases; whoever is free takes the next part.
//
// A phase is over when its work is done, not when every thread has come by: where the machine is busy and a thread has to
// wait for its core, the others go on without it, and it catches up by finding the phases it missed done.
//
// Where a part finds no memory, all that is left is counted as done without being worked on (memory.h), and the call fails.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kitae {

struct Range {
    int64_t begin, end;
};

struct Phase {
    std::atomic<int64_t> taken{0}, done{0};
};

// What the threads of one call have in common: a phase for each call of share() to come, and whether memory was enough.
struct Course {
    explicit Course(int64_t num_phases) : phases(static_cast<size_t>(num_phases)) {}

    std::vector<Phase> phases;
    Memory memory;
};

class Team {
  public:
    Team(int size, Course& course) : size(size), next_(course.phases.data()), memory_(course.memory) {}

    const int size;

    // One phase: work(Range) for parts of 0 ... count, each on one thread. Returns when all of them are done.
    template <class Work> void share(int64_t count, Work work) const {
        Phase& phase = *next_++;
        const int64_t most = size == 1 ? 1 : PARTS * size, parts = count < most ? count : most;
        for (int64_t part; (part = phase.taken.fetch_add(1, std::memory_order_relaxed)) < parts;) {
            memory_.run([&] { work(Range{count * part / parts, count * (part + 1) / parts}); });
            phase.done.fetch_add(1, std::memory_order_release);
        }
        for (int turns = 0; phase.done.load(std::memory_order_acquire) < parts; turns++) {
            if (turns < TURNS)
                pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int64_t PARTS = 4;  // of a phase's work for each thread
    static constexpr int TURNS = 5000;   // before a waiting thread offers its core to others

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    mutable Phase* next_;
    Memory& memory_;
};

}  // namespace kitae
