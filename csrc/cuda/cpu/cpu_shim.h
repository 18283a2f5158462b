// Runs the kernels of this folder on the CPU, for tests: -DB2_CPU with g++ and the CUDA headers.
//
// One fibre a CUDA thread, one block after the other. A fibre runs until a barrier: __syncthreads waits for the
// whole block, a shuffle for the warp. A barrier that not all threads reach ends the program. What this does not
// show: races that need two threads at once, speed, anything of tensor cores. Running threads and blocks in the
// opposite order (b2_cpu_order) shows a missing barrier or blocks that depend on each other.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __launch_bounds__(threads)
#define __grid_constant__

namespace b2_cpu {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fibre {
  uint3 thread{};
  State state = State::kReady;
  bool entered = false;
  int parity = 0;  // of shuffles: two mailboxes, so that one barrier a shuffle is enough
  std::uint64_t mail[2] = {};
  jmp_buf point;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  std::vector<std::unique_ptr<Fibre>> fibres;
  Fibre* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  uint3 block{};
  dim3 grid, size;
  bool backwards = false;
  std::int64_t first_block = 0;  // of the grid, counted with x fastest
};

inline Machine machine;
constexpr std::size_t kStackBytes = 64 * 1024;

// setcontext enters a fibre once; _setjmp and _longjmp then switch without a system call.
__attribute__((noinline)) inline void resume(Fibre* fibre) {
  machine.current = fibre;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre->entered) _longjmp(fibre->point, 1);
  fibre->entered = true;
  setcontext(&fibre->context);
}

__attribute__((noinline)) inline void wait(State state) {
  machine.current->state = state;
  if (_setjmp(machine.current->point) == 0) _longjmp(machine.scheduler, 1);
}

inline void live() {
  for (;;) {
    machine.body();
    wait(State::kDone);
  }
}

inline void prepare(std::size_t count) {
  while (machine.fibres.size() < count) {
    auto fibre = std::make_unique<Fibre>();
    fibre->stack.reset(new char[kStackBytes]);
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = fibre->stack.get();
    fibre->context.uc_stack.ss_size = kStackBytes;
    makecontext(&fibre->context, live, 0);
    machine.fibres.push_back(std::move(fibre));
  }
}

// Lets [first, last) go on if all of them wait at the same kind of barrier.
inline bool release(std::size_t first, std::size_t last, State state) {
  for (std::size_t i = first; i < last; ++i) {
    if (machine.fibres[i]->state != state) return false;
  }
  for (std::size_t i = first; i < last; ++i) machine.fibres[i]->state = State::kReady;
  return true;
}

inline void run_block(std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    machine.fibres[i]->state = State::kReady;
    machine.fibres[i]->thread = {unsigned(i), 0, 0};
  }
  for (;;) {
    for (std::size_t k = 0; k < count; ++k) {
      Fibre* fibre = machine.fibres[machine.backwards ? count - 1 - k : k].get();
      if (fibre->state == State::kReady) resume(fibre);
    }
    bool goes_on = release(0, count, State::kAtBlockBarrier);
    for (std::size_t warp = 0; warp < count; warp += 32) {
      goes_on |= release(warp, warp + 32 < count ? warp + 32 : count, State::kAtWarpBarrier);
    }
    if (goes_on) continue;
    std::size_t waiting[4] = {};
    for (std::size_t i = 0; i < count; ++i) ++waiting[static_cast<int>(machine.fibres[i]->state)];
    if (waiting[static_cast<int>(State::kDone)] == count) return;
    std::fprintf(stderr, "barrier not reached by all threads: %zu at __syncthreads, %zu at a shuffle, %zu have left\n",
                 waiting[1], waiting[2], waiting[3]);
    std::abort();
  }
}

// Blocks of one dimension only: what the kernels here use.
template <class Body>
void launch(dim3 grid, dim3 size, Body body) {
  machine.body = body;
  machine.grid = grid;
  machine.size = size;
  prepare(size.x);
  const std::int64_t blocks = std::int64_t(grid.x) * grid.y * grid.z;
  for (std::int64_t k = machine.first_block; k < blocks; ++k) {
    const std::int64_t i = machine.backwards ? blocks - 1 - (k - machine.first_block) : k;
    machine.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(size.x);
  }
}

inline float shuffle_xor(float value, int mask) {
  Fibre* self = machine.current;
  const std::size_t other = self->thread.x ^ unsigned(mask);
  const int box = self->parity ^= 1;
  if (other >= machine.size.x) std::fprintf(stderr, "shuffle with lane %zu, which is not there\n", other), std::abort();
  std::memcpy(&self->mail[box], &value, sizeof value);
  wait(State::kAtWarpBarrier);
  std::memcpy(&value, &machine.fibres[other]->mail[box], sizeof value);
  return value;
}

}  // namespace b2_cpu

// Threads and blocks from the last to the first; and only the blocks from `first_block` on, for tests of offsets.
extern "C" inline __attribute__((used)) void b2_cpu_order(int backwards, std::int64_t first_block) {
  b2_cpu::machine.backwards = backwards != 0;
  b2_cpu::machine.first_block = first_block;
}

#define threadIdx (b2_cpu::machine.current->thread)
#define blockIdx (b2_cpu::machine.block)
#define blockDim (b2_cpu::machine.size)
#define gridDim (b2_cpu::machine.grid)
#define B2_LAUNCH(kernel, grid, size, stream, ...) \
  (static_cast<void>(stream), b2_cpu::launch(grid, size, [=] { kernel(__VA_ARGS__); }), 0)

inline void __syncthreads() { b2_cpu::wait(b2_cpu::State::kAtBlockBarrier); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return b2_cpu::shuffle_xor(value, mask); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
