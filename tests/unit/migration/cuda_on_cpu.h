// Runs CUDA kernels on the processor: blocks one after the other, the threads of a block as fibers. A thread runs until it meets others (__syncthreads, a *_sync
// function); when all that it waits for are there, all go on. The order of the threads is given, so that what hangs on an order is seen. What would be undefined on a GPU is
// an error here, or gives bytes that nobody would take for right: shared memory is filled with rubbish before each block, lanes outside a mask give rubbish, and waiting for
// who never comes ends the launch.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static volatile __attribute__((section("block_shared")))

struct uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
struct Dim { unsigned x = 1, y = 1, z = 1; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

extern unsigned char __start_block_shared[] __attribute__((weak)), __stop_block_shared[] __attribute__((weak));

namespace shim {
enum State { READY, AT_BARRIER, IN_WARP, ENDED };
enum Operation { SYNC, SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, BALLOT, EVERY };
constexpr uint64_t RUBBISH = 0xb0b1b2b3b4b5b6b7ull;
constexpr size_t STACK = 64 << 10;

struct Fiber {
    ucontext_t context;  // its first entry
    jmp_buf at;          // where it goes on: unlike swapcontext, without a call of the kernel
    bool entered;
    State state;
    Operation operation;
    unsigned mask, argument;
    uint64_t value, result;
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static jmp_buf scheduler;
static unsigned running;
static void (*body)(void**);
static void** body_arguments;
static const char* failure;

__attribute__((noinline)) inline void yield() {
    if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

inline uint64_t meet(Operation operation, unsigned mask, uint64_t value, unsigned argument) {
    Fiber& mine = fibers[running];
    mine.state = IN_WARP, mine.operation = operation, mine.mask = mask, mine.value = value, mine.argument = argument;
    yield();
    return fibers[running].result;
}

inline void thread() {
    body(body_arguments);
    fibers[running].state = ENDED;
    yield();
}

// Whether a warp's lanes that wait for each other were all there, and went on.
inline bool resolve(unsigned first, unsigned threads) {
    bool moved = false;
    for (unsigned lane = 0; lane < 32 && first + lane < threads; lane++) {
        Fiber& one = fibers[first + lane];
        if (one.state != IN_WARP) continue;
        if (!(one.mask >> lane & 1)) { failure = "a lane calls with a mask that does not name it"; return false; }
        bool all = true;
        for (unsigned other = 0; other < 32; other++) {
            if (!(one.mask >> other & 1)) continue;
            if (first + other >= threads || fibers[first + other].state == ENDED) { failure = "a mask names a lane that has ended or never was"; return false; }
            const Fiber& its = fibers[first + other];
            if (its.state != IN_WARP) all = false;
            else if (its.mask != one.mask || its.operation != one.operation) { failure = "lanes of one mask meet at different places"; return false; }
        }
        if (!all) continue;
        const unsigned mask = one.mask;
        unsigned ballot = 0;
        for (unsigned n = 0; n < 32; n++) if (mask >> n & 1 && fibers[first + n].value) ballot |= 1u << n;
        for (unsigned n = 0; n < 32; n++) {
            if (!(mask >> n & 1)) continue;
            Fiber& its = fibers[first + n];
            unsigned from = n;
            if (its.operation == SHUFFLE) from = its.argument & 31;
            else if (its.operation == SHUFFLE_XOR) from = n ^ its.argument;
            else if (its.operation == SHUFFLE_UP) from = n >= its.argument ? n - its.argument : n;
            else if (its.operation == SHUFFLE_DOWN) from = n + its.argument < 32 ? n + its.argument : n;
            if (its.operation == BALLOT) its.result = ballot;
            else if (its.operation == EVERY) its.result = ballot == mask;
            else its.result = from < 32 && mask >> from & 1 ? fibers[first + from].value : RUBBISH;
        }
        for (unsigned n = 0; n < 32; n++) if (mask >> n & 1) fibers[first + n].state = READY;
        moved = true;
    }
    return moved;
}

__attribute__((noinline)) inline bool advance(unsigned n) {
    if (fibers[n].state != READY) return false;
    running = n;
    threadIdx.x = n;
    if (!_setjmp(scheduler)) {
        if (fibers[n].entered) _longjmp(fibers[n].at, 1);
        fibers[n].entered = true;
        setcontext(&fibers[n].context);
    }
    return true;
}

inline void block(unsigned threads, const std::vector<unsigned>& order, bool greedy) {
    if (__start_block_shared) memset(__start_block_shared, 0xb5, __stop_block_shared - __start_block_shared);
    for (unsigned n = 0; n < threads; n++) {
        Fiber& one = fibers[n];
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = stacks.data() + n * STACK;
        one.context.uc_stack.ss_size = STACK;
        one.context.uc_link = nullptr;
        makecontext(&one.context, thread, 0);
        one.state = READY;
        one.entered = false;
    }
    while (!failure) {
        bool moved = false;
        unsigned ended = 0, waiting = 0;
        if (greedy)  // each warp as far as it gets without the others
            for (unsigned at = 0; at < threads && !failure; at += 32) {
                bool more = true;
                while (more && !failure) {
                    more = false;
                    for (unsigned n = at; n < threads && n < at + 32; n++) more |= advance(order[n]);
                    if (more) moved = true, resolve(order[at] / 32 * 32, threads);
                }
            }
        else
            for (unsigned n : order) moved |= advance(n);
        for (unsigned first = 0; first < threads && !failure; first += 32) moved |= resolve(first, threads);
        for (unsigned n = 0; n < threads; n++) ended += fibers[n].state == ENDED, waiting += fibers[n].state == AT_BARRIER;
        if (ended == threads) return;
        if (waiting && waiting + ended == threads) {
            if (ended) { failure = "a thread ended before a barrier that others wait at"; return; }
            for (unsigned n = 0; n < threads; n++) fibers[n].state = READY;
            moved = true;
        }
        if (!moved) failure = "threads wait for each other for ever";
    }
}

// Order 0: as numbered; 1: the other way round; 2 and 3: the same, each warp running ahead of the next as far as it can; else: mixed by that seed.
inline const char* launch(void (*kernel)(void**), unsigned blocks, unsigned threads, uint64_t order, void** arguments) {
    body = kernel, body_arguments = arguments, failure = nullptr;
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads), stacks.resize(threads * STACK);
    std::vector<unsigned> sequence(threads);
    for (unsigned n = 0; n < threads; n++) sequence[n] = order == 1 || order == 3 ? threads - 1 - n : n;
    const bool greedy = order == 2 || order == 3;
    if (order > 3)
        for (unsigned n = threads - 1; n; n--) {
            order = order * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(sequence[n], sequence[(order >> 33) % (n + 1)]);
        }
    gridDim.x = blocks, blockDim.x = threads;
    for (unsigned n = 0; n < blocks && !failure; n++) blockIdx.x = n, block(threads, sequence, greedy);
    return failure;
}

template <class... Arguments, size_t... At>
inline void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<At...>) { kernel(*static_cast<Arguments*>(arguments[At])...); }
template <class... Arguments>
inline void call(void (*kernel)(Arguments...), void** arguments) { call(kernel, arguments, std::index_sequence_for<Arguments...>{}); }
}  // namespace shim

inline void __syncthreads() { shim::fibers[shim::running].state = shim::AT_BARRIER; shim::yield(); }
inline void __syncwarp(unsigned mask = ~0u) { shim::meet(shim::SYNC, mask, 0, 0); }
template <class T> inline T __shfl_sync(unsigned mask, T value, unsigned lane) { return (T)shim::meet(shim::SHUFFLE, mask, value, lane); }
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, unsigned step) { return (T)shim::meet(shim::SHUFFLE_XOR, mask, value, step); }
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned step) { return (T)shim::meet(shim::SHUFFLE_UP, mask, value, step); }
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned step) { return (T)shim::meet(shim::SHUFFLE_DOWN, mask, value, step); }
inline unsigned __ballot_sync(unsigned mask, bool set) { return (unsigned)shim::meet(shim::BALLOT, mask, set, 0); }
inline int __all_sync(unsigned mask, bool set) { return (int)shim::meet(shim::EVERY, mask, set, 0); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned atomicOr(volatile unsigned* at, unsigned value) { unsigned before = *at; *at = before | value; return before; }

// A kernel as something that can be launched from outside: its arguments as pointers, as cuLaunchKernel takes them. Null, or what went wrong.
#define LAUNCHED(name) \
    extern "C" const char* launch_##name(unsigned blocks, unsigned threads, uint64_t order, void** arguments) { \
        return shim::launch([](void** given) { shim::call(name, given); }, blocks, threads, order, arguments); \
    }
