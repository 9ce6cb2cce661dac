// Preloaded into a Python process: an operator new that, while it is told to, fails once for every place in a library that
// calls it.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

static std::atomic<uintptr_t> begin{0}, end{0};  // of the library; nothing: it never fails
static std::atomic<int64_t> num_failed{0};
static std::atomic<void*> failed[1024];

static bool fails(void* caller) {
    if (uintptr_t(caller) < begin || uintptr_t(caller) >= end) return false;
    for (auto& place : failed) {
        void* known = nullptr;
        if (place.compare_exchange_strong(known, caller)) {
            num_failed++;
            return true;
        }
        if (known == caller) return false;
    }
    std::abort();  // more places than there is room for
}

static void* memory(size_t size, void* caller) {
    void* found = fails(caller) ? nullptr : std::malloc(size ? size : 1);
    if (!found) throw std::bad_alloc();
    return found;
}

void* operator new(size_t size) { return memory(size, __builtin_return_address(0)); }
void* operator new[](size_t size) { return memory(size, __builtin_return_address(0)); }
void operator delete(void* at) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete(void* at, size_t) noexcept { std::free(at); }
void operator delete[](void* at, size_t) noexcept { std::free(at); }

extern "C" {

void begin_failing(uintptr_t from, uintptr_t to) {
    for (auto& place : failed) place = nullptr;
    num_failed = 0;
    begin = from;
    end = to;
}

// How many times it failed.
int64_t end_failing() {
    end = 0;
    return num_failed;
}

}
